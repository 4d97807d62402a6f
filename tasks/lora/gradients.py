"""Gradients of many users' losses in one optimiser step, in micro-batches that fit the device.

A user's loss is the mean over the answer tokens of the user's step: a sum over samples divided by a
known number. So a user with too many samples for one pass is worked off in spans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.forward import label_losses, may_pack, sum_by
from tasks.lora.grouped import Layers, Part, Shapes, assign
from tasks.lora.packing import ONE_PER_ROW, Packed, Span, layout, pack, span_batches, work_off
from tasks.lora.train import Outcome

# Per user of the frozen part: layer -> Part of the users asked for (a list of row numbers).
FrozenPart = Callable[[Sequence[int]], dict[str, Part]]


@dataclass
class Gradients:
    """Computes gradients of LoRAs of `shapes` and `scale` over `frozen` ones.

    positions: those of a micro-batch; halved when the device runs out of memory. outcome: where
    the work is counted.
    """

    base: Base
    layers: Layers
    shapes: Shapes
    scale: float
    frozen: FrozenPart | None
    positions: int
    outcome: Outcome

    def fill(self, grad: Tensor, flat: Tensor, todo: dict[int, list[Encoded]]) -> dict[int, float]:
        """Write the gradient at `flat` [U, P] into `grad` [U, P], 0 for users not in `todo`.

        todo: user -> the samples of the user's step. Returns each of these users' mean loss.
        Raises InputError when a single sample does not fit into the device's memory.
        """
        grad.zero_()
        limit = layout(list(todo.values())) if may_pack(self.base.model) else ONE_PER_ROW
        counts = {u: sum(len(sample.answer) for sample in own) for u, own in todo.items()}
        losses = dict.fromkeys(todo, 0.0)

        def work(batch: list[Span]) -> None:
            users, parts = [user for user, _ in batch], [todo[user][span] for user, span in batch]
            packed = pack(parts, self.base.tokenizer.pad_token_id, limit)
            means = self._micro_batch(grad, flat, users, packed, counts)
            self.outcome.computed += packed.input_ids.numel()
            for user, part, loss in zip(users, parts, means, strict=True):
                losses[user] += loss
                lengths = (len(sample.prompt) + len(sample.answer) for sample in part)
                self.outcome.tokens[user] += sum(lengths)

        halved = work_off(span_batches(todo, limit, self.positions), todo, work)
        self.positions = max(1, self.positions >> halved)
        self.outcome.halved += halved
        return losses

    def _micro_batch(
        self, grad: Tensor, flat: Tensor, users: list[int], packed: Packed, counts: dict[int, int]
    ) -> list[float]:
        """Add the gradients of one pass to `grad`; the losses, of each of `users` in the batch."""
        packed = packed.to(self.base.device)
        rows = torch.tensor(users, device=self.base.device)
        parts = {
            name: Part(a.requires_grad_(), b.requires_grad_(), self.scale)
            for name, (a, b) in self.shapes.split(flat[rows]).items()
        }
        assign(self.layers, frozen=self.frozen(users) if self.frozen else None, trained=parts)
        by_label = label_losses(self.base, packed)
        labels = torch.tensor(
            [counts[user] for user in users], dtype=by_label.dtype, device=self.base.device
        )
        losses = sum_by(by_label, packed.user, len(users)) / labels
        factors = [factor for part in parts.values() for factor in (part.a, part.b)]
        gradients = torch.autograd.grad(losses.sum(), factors)
        grad.index_add_(0, rows, torch.cat([one.flatten(1) for one in gradients], 1))
        return losses.tolist()

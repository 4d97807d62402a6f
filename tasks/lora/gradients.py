"""Gradients of many users' losses in one optimiser step, in micro-batches that fit the device.

A user's loss is the mean over all answer tokens of the user's step. It is a sum over samples
divided by a number known beforehand, so a user whose samples are too many for one pass is worked
off in pieces, and the gradient is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tasks.errors import InputError
from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.forward import label_losses, may_pack, sum_by
from tasks.lora.grouped import Layers, Part, Shapes, assign
from tasks.lora.packing import ONE_PER_ROW, Packed, footprint, layout, micro_batches, pack

# Per user of the frozen part: layer -> Part of the users asked for (a list of row numbers).
FrozenPart = Callable[[Sequence[int]], dict[str, Part]]
# Some of the samples of one user's step.
Piece = tuple[int, list[Encoded]]


@dataclass
class Budget:
    """Positions per micro-batch; halved when the device runs out of memory."""

    positions: int
    halvings: int = field(default=0)


@dataclass
class Gradients:
    """Computes gradients of LoRAs of `shapes` and `scale` over `frozen` ones, and counts the work.

    computed: positions that went through the model; tokens: those that held a token, per user.
    """

    base: Base
    layers: Layers
    shapes: Shapes
    scale: float
    frozen: FrozenPart | None
    budget: Budget
    tokens: list[int]
    computed: int = 0

    def fill(self, grad: Tensor, flat: Tensor, todo: dict[int, list[Encoded]]) -> dict[int, float]:
        """Write the gradient at `flat` [U, P] into `grad` [U, P], 0 for users not in `todo`.

        todo: user -> the samples of the user's step. Returns each of these users' mean loss.
        Raises InputError when a single sample does not fit into the device's memory.
        """
        grad.zero_()
        limit = layout(list(todo.values())) if may_pack(self.base.model) else ONE_PER_ROW
        counts = {u: sum(len(sample.answer) for sample in own) for u, own in todo.items()}
        queue = step_batches(todo, limit, self.budget.positions)
        losses = dict.fromkeys(todo, 0.0)
        while queue:
            batch = queue.pop(0)
            packed = pack([own for _, own in batch], self.base.tokenizer.pad_token_id, limit)
            try:
                found = self._micro_batch(grad, flat, batch, packed, counts)
            except torch.OutOfMemoryError:
                # Nothing of this micro-batch was kept: its halves start from the same weights.
                queue[:0] = self._halves(batch)
                continue
            self.computed += packed.input_ids.numel()
            for (user, own), loss in zip(batch, found, strict=True):
                losses[user] += loss
                self.tokens[user] += sum(len(sample.prompt) + len(sample.answer) for sample in own)
        return losses

    def _halves(self, batch: list[Piece]) -> list[list[Piece]]:
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
        self.budget.positions = max(1, self.budget.positions // 2)
        self.budget.halvings += 1
        if len(batch) > 1:
            return [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        user, own = batch[0]
        if len(own) == 1:
            length = len(own[0].prompt) + len(own[0].answer)
            raise InputError(
                f"out of memory: one sample of {length} tokens does not fit on the device; "
                "lower base.max_tokens or set base.gradient_checkpointing"
            )
        return [[(user, own[: len(own) // 2])], [(user, own[len(own) // 2 :])]]

    def _micro_batch(
        self, grad: Tensor, flat: Tensor, batch: list[Piece], packed: Packed, counts: dict[int, int]
    ) -> list[float]:
        packed = packed.to(self.base.device)
        users = [user for user, _ in batch]
        rows = torch.tensor(users, device=self.base.device)
        parts = {
            name: Part(a.requires_grad_(), b.requires_grad_(), self.scale)
            for name, (a, b) in self.shapes.split(flat[rows]).items()
        }
        assign(self.layers, frozen=self.frozen(users) if self.frozen else None, trained=parts)
        by_label = label_losses(self.base, packed)
        whole = torch.tensor(
            [counts[user] for user in users], dtype=by_label.dtype, device=self.base.device
        )
        losses = sum_by(by_label, packed.user, len(batch)) / whole
        factors = [factor for part in parts.values() for factor in (part.a, part.b)]
        gradients = torch.autograd.grad(losses.sum(), factors)
        grad.index_add_(0, rows, torch.cat([one.flatten(1) for one in gradients], 1))
        return losses.tolist()


def step_batches(todo: dict[int, list[Encoded]], limit: int, positions: int) -> list[list[Piece]]:
    """One step's samples by user, in micro-batches of at most `positions` (at least one sample).

    limit: the tokens of a row (`layout`).
    """
    pieces = [(user, part) for user, own in todo.items() for part in _pieces(own, limit, positions)]
    sizes = [footprint(part, limit) for _, part in pieces]
    return [[pieces[i] for i in part] for part in micro_batches(sizes, positions)]


def _pieces(samples: list[Encoded], limit: int, positions: int) -> list[list[Encoded]]:
    """The samples of one user as they are, or in pieces of at most `positions` (at least one)."""
    rows, length, _ = footprint(samples, limit)
    if rows * length <= positions:
        return [samples]
    pieces: list[list[Encoded]] = []
    for sample in samples:
        if pieces:
            rows, length, _ = footprint([*pieces[-1], sample], limit)
            if rows * length <= positions:
                pieces[-1].append(sample)
                continue
        pieces.append([sample])
    return pieces

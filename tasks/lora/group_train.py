"""Training the LoRAs of many users at once, each as if trained alone.

Each user has a loss (mean over the answer tokens of the user's step), a clipped gradient norm, a
schedule, a number of steps, and batches by a seed. Losses are summed over users, so no user's
gradient depends on another user. AdamW works element by element. A user whose steps are done stops.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from tasks.lora.adapters import LoraBatch
from tasks.lora.base import Base
from tasks.lora.batches import Encoded, PerUser
from tasks.lora.checkpoint import Checkpoint, Saved
from tasks.lora.cost import gpu_positions, widths_of
from tasks.lora.forward import label_losses, row_limit, sum_by
from tasks.lora.grouped import Layers, Shapes, assigned, fresh
from tasks.lora.packing import Span, pack, span_batches, work_off
from tasks.lora.train import Outcome, Training, epochs, learning_rates

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
# Users (their numbers) -> their frozen LoRAs.
Frozen = Callable[[Sequence[int]], LoraBatch]
# Users and their trained rows [U, P] -> their trained LoRAs, differentiable in the rows.
Loras = Callable[[Sequence[int], Tensor], LoraBatch]


def train_group(
    base: Base,
    layers: Layers,
    shapes: Shapes,
    samples: PerUser,
    options: Training,
    seeds: Sequence[int],
    *,
    scale: float,
    frozen: Frozen | None = None,
    positions: int | None = None,
    initial: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Outcome:
    """Train one LoRA of `shapes` and `scale` per user on the user's `samples`.

    layers: the grouped layers of `base.model` (`grouped`). seeds: per user, for initial weights and
    order of samples. initial [U, P]: weights instead of fresh ones. Training goes on from the state
    that `checkpoint` has. Raises ValueError for a user without samples, InputError if a single
    sample does not fit into the device's memory.
    """
    if empty := [user for user, of_user in enumerate(samples) if not of_user]:
        raise ValueError(f"user {empty[0]}: no samples")
    dtype = torch.float64 if base.model.dtype == torch.float64 else torch.float32
    flat = fresh(shapes, seeds, dtype) if initial is None else initial.to(dtype).clone()
    adam = _AdamW(flat.to(base.device), options)
    plans = [_plan(options, of_user, seed) for of_user, seed in zip(samples, seeds, strict=True)]
    rates_of = {len(plan): learning_rates(options, len(plan)) for plan in plans}
    total = max(rates_of)
    outcome = Outcome(adam.flat, [[] for _ in samples], [0] * len(samples))
    if saved := checkpoint.load() if checkpoint else None:
        for name, tensor in adam.tensors().items():
            tensor.copy_(saved.tensors[name])
        adam.steps, outcome = saved.step, Outcome(adam.flat, **saved.facts)
    most = positions or default_positions(base)
    gradients = Gradients(
        base, layers, lambda _, rows: LoraBatch(shapes.split(rows), scale), frozen, most, outcome
    )
    # Without dropout, the mode matters for checkpointing only: transformers does it in training.
    base.model.train(base.model.is_gradient_checkpointing)
    try:
        for step in range(adam.steps, total):
            active = [u for u, plan in enumerate(plans) if step < len(plan)]
            active = [u for u in active if u not in outcome.failed]
            todo = {u: [samples[u][i] for i in plans[u][step]] for u in active}
            losses = gradients.fill(adam.grad, adam.flat, todo)
            rates = {u: rates_of[len(plans[u])][step] for u in active}
            failed, seen = adam.step(rates, losses)
            outcome.failed += failed
            for user, loss in seen.items():
                outcome.losses[user].append(loss)
            if checkpoint and checkpoint.due():
                checkpoint.save(Saved(adam.steps, adam.tensors(), outcome.facts()))
            if progress:
                progress(step + 1, total)
    finally:
        # The loaded model serves the next job too, whatever became of this one.
        base.model.eval()
    return outcome


def _plan(options: Training, samples: Sequence[Encoded], seed: int) -> list[list[int]]:
    """The samples (their numbers) of each of a user's steps: memory decides how a step is split."""
    return [[*chain(*step)] for step in epochs(len(samples), options, seed)]


def default_positions(base: Base) -> int:
    """Positions per micro-batch: by the model's size on a CPU, by the free memory on a GPU."""
    widths = widths_of(base.model)
    if base.device.type == "cpu":
        # A layer's output should not be much larger than the caches: every operation would take
        # fresh pages for it, which cost more than the arithmetic.
        return max(512, min(16_384, 2**24 // (4 * widths.wide)))
    free, _ = torch.cuda.mem_get_info(base.device)
    # What torch has cached is free, too.
    free += torch.cuda.memory_reserved(base.device) - torch.cuda.memory_allocated(base.device)
    model = base.model
    return gpu_positions(widths, model.dtype.itemsize, model.is_gradient_checkpointing, free)


@dataclass
class Gradients:
    """Gradients of the rows that users' `loras` are made of, over `frozen` LoRAs, in micro-batches.

    A user's loss is a sum over samples divided by a known number. So a user with too many samples
    for one pass is worked off in spans. positions: of a micro-batch; halved each time the device
    runs out of memory. outcome: counts the work.
    """

    base: Base
    layers: Layers
    loras: Loras
    frozen: Frozen | None
    positions: int
    outcome: Outcome

    def fill(self, grad: Tensor, flat: Tensor, todo: dict[int, list[Encoded]]) -> Tensor:
        """Write the gradient at `flat` [U, P] into `grad` [U, P], 0 for users not in `todo`.

        todo: user -> the samples of the user's step. Returns each user's mean loss [U] (float64).
        The host waits for nothing: on a GPU it may be ahead by all micro-batches.
        """
        grad.zero_()
        base, outcome = self.base, self.outcome
        limit = row_limit(base, todo.values())
        labels = {user: sum(len(one.answer) for one in step) for user, step in todo.items()}
        losses = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)

        def work(batch: list[Span]) -> None:
            users, parts = [user for user, _ in batch], [todo[user][span] for user, span in batch]
            packed = pack(parts, base.tokenizer.pad_token_id, limit).to(base.device)
            rows = torch.tensor(users).to(base.device, non_blocking=True)
            numbers = flat[rows].requires_grad_()
            trained = self.loras(users, numbers)
            frozen = self.frozen(users) if self.frozen else None
            # Assigned until the gradients are there: with checkpointing the layers run again.
            with assigned(self.layers, frozen, trained, base.adapter_dtype):
                by_label = label_losses(base, packed)
                counts = torch.tensor([labels[user] for user in users])
                counts = counts.to(by_label, non_blocking=True)
                means = sum_by(by_label, packed.user, len(users)) / counts
                (gradient,) = torch.autograd.grad(means.sum(), numbers)
            # Sums come after all that may run out of memory: a pass that fails is repeated.
            mean_losses = means.detach().double()
            grad.index_add_(0, rows, gradient)
            losses.index_add_(0, rows, mean_losses)
            outcome.computed += packed.input_ids.numel()
            for user, part in zip(users, parts, strict=True):
                outcome.tokens[user] += sum(sample.length for sample in part)

        positions = max(1, self.positions >> outcome.halved)
        outcome.halved += work_off(span_batches(todo, limit, positions), todo, work)
        return losses


class _AdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on rows [U, P]; rate and clipping per row."""

    def __init__(self, flat: Tensor, options: Training) -> None:
        self.flat = flat
        self.grad, self.mean, self.square = (torch.zeros_like(flat) for _ in range(3))
        self.options = options
        self.steps = 0

    def tensors(self) -> dict[str, Tensor]:
        """The state that a step changes: weights and moments, each [U, P]."""
        return {"flat": self.flat, "mean": self.mean, "square": self.square}

    def step(self, rates: dict[int, float], losses: Tensor) -> tuple[list[int], dict[int, float]]:
        """One step of the rows with a rate.

        losses: of all rows [U] (float64). Returns the rows that failed and stay as they were, since
        loss or gradient is not finite, and the loss of each row with a rate.
        """
        self.steps += 1
        norms = self.grad.norm(dim=1)
        # The only time in a step that the host waits for the GPU.
        norm_of, loss_of = torch.stack([norms.double(), losses]).tolist()
        failed = [u for u in rates if not (math.isfinite(norm_of[u]) and math.isfinite(loss_of[u]))]
        moving = [u for u in rates if u not in failed]
        seen = {u: loss_of[u] for u in rates}
        if not moving:
            return failed, seen
        # All rows at once while all move; a copy of the moving rows when some have stopped.
        everyone = len(moving) == len(self.flat)
        device = self.flat.device
        rows = slice(None) if everyone else torch.tensor(moving).to(device, non_blocking=True)
        flat, grad = self.flat[rows], self.grad[rows]
        mean, square = self.mean[rows], self.square[rows]
        # torch.nn.utils.clip_grad_norm_, row by row: the factor is capped at 1, with its 1e-6.
        clip = (self.options.max_grad_norm / (norms[rows] + 1e-6)).clamp_(max=1.0)
        grad = grad * clip[:, None]
        rate = torch.tensor([[rates[u]] for u in moving], dtype=flat.dtype)
        rate = rate.to(device, non_blocking=True)
        flat.mul_(1.0 - rate * self.options.weight_decay)
        mean.lerp_(grad, 1.0 - BETA1)
        square.mul_(BETA2).addcmul_(grad, grad, value=1.0 - BETA2)
        root = (square.sqrt() / math.sqrt(1.0 - BETA2**self.steps)).add_(EPSILON)
        flat.sub_(rate / (1.0 - BETA1**self.steps) * mean / root)
        if not everyone:
            self.flat[rows], self.mean[rows], self.square[rows] = flat, mean, square
        return failed, seen

"""Training the LoRAs of many users at once, each as if trained alone.

Each user has its own loss (mean over the answer tokens of the user's step), clipped gradient norm,
schedule, number of steps, and batches by its own seed. Losses are summed over users, so no user's
gradient sees another's. AdamW works element by element; users that have done their steps stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.checkpoint import Checkpoint
from tasks.lora.cost import cpu_positions, gpu_positions, widths_of
from tasks.lora.gradients import FrozenPart, Gradients
from tasks.lora.grouped import Layers, Shapes, clear, fresh
from tasks.lora.train import Outcome, Training, batches_of, learning_rates

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def train_group(
    base: Base,
    layers: Layers,
    shapes: Shapes,
    samples: Sequence[Sequence[Encoded]],
    options: Training,
    seeds: Sequence[int],
    *,
    scale: float,
    frozen: FrozenPart | None = None,
    positions: int | None = None,
    initial: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Outcome:
    """Train one LoRA of `shapes` and `scale` per user on the user's `samples`.

    layers: the grouped layers of `base.model` (`grouped`). seeds: per user, for initial weights and
    order of samples. initial [U, P]: weights instead of fresh ones. Training goes on from the state
    that `checkpoint` has. Raises ValueError for a user without samples, InputError when a single
    sample does not fit into the device's memory.
    """
    if any(not own for own in samples):
        raise ValueError(f"user {next(u for u, own in enumerate(samples) if not own)}: no samples")
    dtype = torch.float64 if base.model.dtype == torch.float64 else torch.float32
    flat = fresh(shapes, seeds, dtype) if initial is None else initial.to(dtype).clone()
    state = _AdamW(flat.to(base.device), options)
    plans = [batches_of(len(own), options, s) for own, s in zip(samples, seeds, strict=True)]
    outcome = Outcome(state.flat, [[] for _ in samples], [0] * len(samples), [])
    rates_of = {len(plan): learning_rates(options, len(plan)) for plan in plans}
    positions = positions or default_positions(base)
    gradients = Gradients(base, layers, shapes, scale, frozen, positions, outcome)
    total = max(len(plan) for plan in plans)
    if saved := checkpoint.load(state.tensors()) if checkpoint else None:
        for name, tensor in state.tensors().items():
            tensor.copy_(saved.tensors[name])
        state.steps, gradients.positions = saved.step, saved.facts["positions"]
        outcome.restore(saved)
    # Without dropout, the mode matters for checkpointing only: transformers does it in training.
    base.model.train(base.model.is_gradient_checkpointing)
    try:
        for step in range(state.steps, total):
            active = [
                u for u, plan in enumerate(plans) if step < len(plan) and u not in outcome.failed
            ]
            todo = {u: [samples[u][i] for i in plans[u][step]] for u in active}
            losses = gradients.fill(state.grad, state.flat, todo)
            rates = [
                rates_of[len(plan)][step] if u in todo else 0.0 for u, plan in enumerate(plans)
            ]
            outcome.failed += state.step(rates, active, losses)
            for user in active:
                outcome.losses[user].append(losses[user])
            if checkpoint and checkpoint.due():
                kept = outcome.saved(state.steps, state.tensors(), positions=gradients.positions)
                checkpoint.save(kept)
            if progress:
                progress(step + 1, total)
    finally:
        # The loaded model serves the next job too, whatever became of this one.
        clear(layers)
        base.model.eval()
    return outcome


def default_positions(base: Base) -> int:
    """Positions per micro-batch: by the model's size on a CPU, by the free memory on a GPU."""
    widths = widths_of(base.model)
    if base.device.type == "cpu":
        return cpu_positions(widths)
    free, _ = torch.cuda.mem_get_info(base.device)
    # What torch has cached is free, too.
    free += torch.cuda.memory_reserved(base.device) - torch.cuda.memory_allocated(base.device)
    model = base.model
    return gpu_positions(widths, model.dtype.itemsize, model.is_gradient_checkpointing, free)


class _AdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on rows [U, P], a rate and a clip per row."""

    def __init__(self, flat: Tensor, options: Training) -> None:
        self.flat = flat
        self.grad = torch.zeros_like(flat)
        self.mean = torch.zeros_like(flat)
        self.square = torch.zeros_like(flat)
        self.options = options
        self.steps = 0

    def tensors(self) -> dict[str, Tensor]:
        """What changes from step to step: weights and moments, each [U, P]."""
        return {"flat": self.flat, "mean": self.mean, "square": self.square}

    def step(self, rates: list[float], active: list[int], losses: dict[int, float]) -> list[int]:
        """One step of the active rows; returns those that were not finite and were left alone."""
        self.steps += 1
        norms = self.grad.norm(dim=1)
        finite = torch.isfinite(norms).tolist()
        failed = [u for u in active if not (finite[u] and math.isfinite(losses[u]))]
        moving = [u for u in active if u not in failed]
        if not moving:
            return failed
        # All rows at once while all move; a copy of the moving rows when some have stopped.
        everyone = len(moving) == len(self.flat)
        rows = slice(None) if everyone else torch.tensor(moving, device=self.flat.device)
        flat, grad = self.flat[rows], self.grad[rows]
        mean, square = self.mean[rows], self.square[rows]
        # torch.nn.utils.clip_grad_norm_, row by row: the factor is capped at 1, with its 1e-6.
        clip = (self.options.max_grad_norm / (norms[rows] + 1e-6)).clamp_(max=1.0)
        grad = grad * clip[:, None]
        chosen = [[rates[u]] for u in moving]
        rate = torch.tensor(chosen, dtype=flat.dtype, device=flat.device)
        flat.mul_(1.0 - rate * self.options.weight_decay)
        mean.lerp_(grad, 1.0 - BETA1)
        square.mul_(BETA2).addcmul_(grad, grad, value=1.0 - BETA2)
        root = (square.sqrt() / math.sqrt(1.0 - BETA2**self.steps)).add_(EPSILON)
        flat.sub_(rate / (1.0 - BETA1**self.steps) * mean / root)
        if not everyone:
            self.flat[rows], self.mean[rows], self.square[rows] = flat, mean, square
        return failed

"""Training the LoRAs of many users at once, each as if trained alone.

Every user has a loss of its own (mean over the answer tokens of the user's step), a gradient norm
of its own that is clipped, a schedule of its own with its own number of steps, and batches drawn by
its own seed. Losses are summed over users, so no user's gradient sees another's. AdamW works
element by element; users that have done their steps stop, none starts over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.checkpoint import Checkpoint, Saved
from tasks.lora.cost import cpu_positions, gpu_positions, widths_of
from tasks.lora.gradients import Budget, FrozenPart, Gradients
from tasks.lora.grouped import Layers, Shapes, clear, fresh
from tasks.lora.train import Recipe, epochs

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass
class Outcome:
    """What training U users gave.

    flat [U, P]: the trained weights. losses: per user, per optimiser step. tokens: per user.
    failed: users whose loss or gradient became NaN or infinite; they stopped there, with the
    weights of the step before. padding: share of computed positions that held no token.
    """

    flat: Tensor
    losses: list[list[float]]
    tokens: list[int]
    failed: list[int]
    computed: int = 0
    halved: int = 0

    @property
    def padding(self) -> float:
        return 1.0 - sum(self.tokens) / max(self.computed, 1)


def train_group(
    base: Base,
    layers: Layers,
    shapes: Shapes,
    samples: Sequence[Sequence[Encoded]],
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    scale: float,
    frozen: FrozenPart | None = None,
    budget: Budget | None = None,
    initial: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Outcome:
    """Train one LoRA of `shapes` and `scale` per user on the user's `samples`.

    `layers` are the grouped layers of `base.model` (`grouped`); `seeds` has one per
    user, for initial weights and order of samples. `initial` [U, P] replaces fresh
    weights. `checkpoint` keeps the state while it goes on; where it has one, training goes on from
    there, with the numbers it would have had. Raises ValueError for a user without samples,
    InputError when a single sample does not fit into the device's memory.
    """
    if any(not own for own in samples):
        raise ValueError(f"user {next(u for u, own in enumerate(samples) if not own)}: no samples")
    budget = budget or Budget(default_positions(base))
    dtype = torch.float64 if base.model.dtype == torch.float64 else torch.float32
    flat = fresh(shapes, seeds, dtype) if initial is None else initial.to(dtype).clone()
    state = _AdamW(flat.to(base.device), recipe)
    plans = [
        [[i for micro in step for i in micro] for step in epochs(len(own), recipe, seed)]
        for own, seed in zip(samples, seeds, strict=True)
    ]
    outcome = Outcome(state.flat, [[] for _ in samples], [0] * len(samples), [])
    gradients = Gradients(base, layers, shapes, scale, frozen, budget, outcome.tokens)
    total = max(len(plan) for plan in plans)
    first = _restore(checkpoint, state, outcome, gradients) if checkpoint else 0
    # There is no dropout; but transformers checkpoints gradients in training mode only.
    base.model.train(base.model.is_gradient_checkpointing)
    try:
        for step in range(first, total):
            active = [
                u for u, plan in enumerate(plans) if step < len(plan) and u not in outcome.failed
            ]
            todo = {u: [samples[u][i] for i in plans[u][step]] for u in active}
            losses = gradients.fill(state.grad, state.flat, todo)
            rates = [
                learning_rate(recipe, step, len(plans[u])) if u in todo else 0.0
                for u in range(len(plans))
            ]
            outcome.failed += state.step(rates, active, losses)
            for user in active:
                outcome.losses[user].append(losses[user])
            if checkpoint and checkpoint.due():
                checkpoint.save(_kept(state, outcome, gradients))
            if progress:
                progress(step + 1, total)
    finally:
        # The loaded model serves the next job too, whatever became of this one.
        clear(layers)
        base.model.eval()
    outcome.computed, outcome.halved = gradients.computed, budget.halvings
    return outcome


def _kept(state: _AdamW, outcome: Outcome, gradients: Gradients) -> Saved:
    """All that decides what the next steps do, and all that was counted."""
    losses = [loss for own in outcome.losses for loss in own]
    return Saved(
        step=state.steps,
        tensors=state.tensors()
        | {
            # As numbers, not text: a loss may be NaN, which JSON does not know.
            "losses": torch.tensor(losses, dtype=torch.float64),
            "steps": torch.tensor([len(own) for own in outcome.losses]),
            "tokens": torch.tensor(outcome.tokens),
        },
        facts={
            "failed": outcome.failed,
            "computed": gradients.computed,
            "positions": gradients.budget.positions,
            "halvings": gradients.budget.halvings,
        },
    )


def _restore(checkpoint: Checkpoint, state: _AdamW, outcome: Outcome, gradients: Gradients) -> int:
    """Put back what `_kept` kept, if anything; the number of optimiser steps done."""
    saved = checkpoint.load(state.tensors())
    if saved is None:
        return 0
    for name, tensor in state.tensors().items():
        tensor.copy_(saved.tensors[name])
    state.steps = saved.step
    parts = saved.tensors["losses"].split(saved.tensors["steps"].tolist())
    outcome.losses[:] = [part.tolist() for part in parts]
    outcome.tokens[:] = saved.tensors["tokens"].tolist()
    outcome.failed[:] = saved.facts["failed"]
    gradients.computed = saved.facts["computed"]
    gradients.budget.positions = saved.facts["positions"]
    gradients.budget.halvings = saved.facts["halvings"]
    return saved.step


def default_positions(base: Base) -> int:
    """Positions per micro-batch: by the model's size on a CPU, and by what is free on a GPU.

    Free is what torch has cached, too.
    """
    widths = widths_of(base.model)
    if base.device.type == "cpu":
        return cpu_positions(widths)
    free, _ = torch.cuda.mem_get_info(base.device)
    free += torch.cuda.memory_reserved(base.device) - torch.cuda.memory_allocated(base.device)
    model = base.model
    return gpu_positions(widths, model.dtype.itemsize, model.is_gradient_checkpointing, free)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The rate of optimiser step `step` (from 0) of `steps`, as transformers' schedules have it.

    Linear warm-up over ceil(share * steps) steps, then `cosine` (half a wave to 0), `linear` (to 0)
    or `constant`.
    """
    warmup = math.ceil(recipe.warmup_share * steps)
    if step < warmup:
        return recipe.learning_rate * step / max(1, warmup)
    if recipe.schedule == "constant":
        return recipe.learning_rate
    if recipe.schedule == "linear":
        return recipe.learning_rate * max(0.0, (steps - step) / max(1, steps - warmup))
    share = (step - warmup) / max(1, steps - warmup)
    return recipe.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * share)))


class _AdamW:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on rows [U, P], a rate and a clip per row."""

    def __init__(self, flat: Tensor, recipe: Recipe) -> None:
        self.flat = flat
        self.grad = torch.zeros_like(flat)
        self.mean = torch.zeros_like(flat)
        self.square = torch.zeros_like(flat)
        self.recipe = recipe
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
        clip = (self.recipe.max_grad_norm / (norms[rows] + 1e-6)).clamp_(max=1.0)
        grad = grad * clip[:, None]
        chosen = [[rates[u]] for u in moving]
        rate = torch.tensor(chosen, dtype=flat.dtype, device=flat.device)
        flat.mul_(1.0 - rate * self.recipe.weight_decay)
        mean.lerp_(grad, 1.0 - BETA1)
        square.mul_(BETA2).addcmul_(grad, grad, value=1.0 - BETA2)
        root = (square.sqrt() / math.sqrt(1.0 - BETA2**self.steps)).add_(EPSILON)
        flat.sub_(rate / (1.0 - BETA1**self.steps) * mean / root)
        if not everyone:
            self.flat[rows], self.mean[rows], self.square[rows] = flat, mean, square
        return failed

"""Training a whole model (the tiny base), and what all training shares: recipe and batches.

AdamW (betas 0.9 and 0.999), gradients clipped to a global norm per step, a schedule of
transformers, loss averaged over the answer tokens of one optimiser step. No dropout, and no
global random state: batches are drawn by a generator of the job's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import get_scheduler

from tasks.lora.base import Base
from tasks.lora.batches import Encoded, answer_logits, collate


@dataclass(frozen=True)
class Recipe:
    """How something is trained; the fields of `TrainingOptions` that the loop reads."""

    learning_rate: float
    epochs: int
    batch_size: int
    accumulation: int
    schedule: str
    warmup_share: float
    max_grad_norm: float
    weight_decay: float


@dataclass(frozen=True)
class Trained:
    """Loss per optimiser step (mean over answer tokens), tokens seen, samples cut to fit."""

    losses: list[float]
    tokens: int
    truncated: int


def epochs(count: int, recipe: Recipe, seed: int) -> Iterator[list[list[int]]]:
    """Optimiser steps as lists of micro-batches of sample indices; the last step may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    size = recipe.batch_size
    for _ in range(recipe.epochs):
        order = torch.randperm(count, generator=generator).tolist()
        micro = [order[start : start + size] for start in range(0, count, size)]
        for start in range(0, len(micro), recipe.accumulation):
            yield micro[start : start + recipe.accumulation]


def fit(
    base: Base,
    model: Any,
    parameters: Sequence[torch.nn.Parameter],
    samples: Sequence[Encoded],
    recipe: Recipe,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train `parameters` of `model` (a model around or equal to `base.model`) on `samples`.

    `progress(done, total)` is called after each optimiser step. Raises ValueError without
    samples, FloatingPointError when the loss is not finite.
    """
    if not samples:
        raise ValueError("fit needs at least one sample")
    steps = list(epochs(len(samples), recipe, seed))
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, foreach=True
    )
    # transformers counts warm-up steps by rounding up, so with two steps the first has rate 0.
    warmup = int(-(-recipe.warmup_share * len(steps) // 1))
    schedule = get_scheduler(
        "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=len(steps),
    )
    losses, tokens = [], 0
    model.train()
    for number, micro_batches in enumerate(steps):
        labelled = sum(len(samples[i].answer) for batch in micro_batches for i in batch)
        total = 0.0
        for indices in micro_batches:
            batch = collate(base, [samples[i] for i in indices])
            logits = answer_logits(model, batch)
            loss = cross_entropy(
                logits.flatten(0, 1).float(), batch.labels.flatten(), reduction="sum"
            )
            (loss / labelled).backward()
            total += loss.item()
            tokens += int(batch.attention_mask.sum())
        if not torch.isfinite(torch.tensor(total)):
            raise FloatingPointError(f"loss is {total} at step {number}; lower the learning rate")
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total / labelled)
        if progress:
            progress(number + 1, len(steps))
    model.eval()
    if not all(torch.isfinite(parameter).all() for parameter in parameters):
        raise FloatingPointError("the last step made weights that are not finite; lower the rate")
    return Trained(losses, tokens, sum(sample.truncated for sample in samples))

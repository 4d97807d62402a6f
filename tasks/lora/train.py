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
from torch import Tensor
from transformers import get_scheduler

from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.checkpoint import Checkpoint, Saved
from tasks.lora.forward import label_losses
from tasks.lora.packing import ONE_PER_ROW, pack


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
    parameters: Sequence[torch.nn.Parameter],
    samples: Sequence[Encoded],
    steps: Sequence[Sequence[Sequence[int]]],
    recipe: Recipe,
    progress: Callable[[int, int], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Train `parameters` of the base model on `samples`, in the batches that `steps` names.

    steps: per optimiser step its micro-batches, as indices of samples (`epochs`).
    `progress(done, total)` is called after each optimiser step. `checkpoint` keeps the state while
    it goes on, and training goes on from the state it has. Raises ValueError without
    samples, FloatingPointError when the loss is not finite.
    """
    if not samples:
        raise ValueError("fit needs at least one sample")
    model, pad = base.model, base.tokenizer.pad_token_id
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
    losses: list[float] = []
    tokens = 0
    if saved := checkpoint.load(_weights(parameters)) if checkpoint else None:
        _restore(saved, parameters, optimizer, schedule)
        losses, tokens = saved.tensors["losses"].tolist(), saved.facts["tokens"]
    model.train()
    for number, micro_batches in enumerate(steps[len(losses) :], start=len(losses)):
        labelled = sum(len(samples[i].answer) for batch in micro_batches for i in batch)
        total = 0.0
        for indices in micro_batches:
            # One "user" with all samples, each in a row of its own.
            packed = pack([[samples[i] for i in indices]], pad, ONE_PER_ROW).to(base.device)
            loss = label_losses(base, packed).sum()
            (loss / labelled).backward()
            total += loss.item()
            tokens += packed.tokens
        if not torch.isfinite(torch.tensor(total)):
            raise FloatingPointError(f"loss is {total} at step {number}; lower the learning rate")
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total / labelled)
        if checkpoint and checkpoint.due():
            checkpoint.save(_kept(parameters, optimizer, schedule, losses, tokens))
        if progress:
            progress(number + 1, len(steps))
    model.eval()
    if not all(torch.isfinite(parameter).all() for parameter in parameters):
        raise FloatingPointError("the last step made weights that are not finite; lower the rate")
    return Trained(losses, tokens, sum(sample.truncated for sample in samples))


def _weights(parameters: Sequence[torch.nn.Parameter]) -> dict[str, Tensor]:
    return {f"{number}.weight": one.detach() for number, one in enumerate(parameters)}


def _kept(
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    losses: list[float],
    tokens: int,
) -> Saved:
    moments = {
        f"{number}.{name}": tensor
        for number, own in optimizer.state_dict()["state"].items()
        for name, tensor in own.items()
    }
    kept = {**_weights(parameters), **moments, "losses": torch.tensor(losses, dtype=torch.float64)}
    return Saved(len(losses), kept, {"tokens": tokens, "schedule": schedule.state_dict()})


def _restore(
    saved: Saved,
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: Any,
) -> None:
    """Put weights, AdamW's moments and the rate back as `_kept` kept them."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in saved.tensors.items():
        number, _, part = name.partition(".")
        if part == "weight":
            parameters[int(number)].data.copy_(tensor)
        elif part:
            state.setdefault(int(number), {})[part] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    schedule.load_state_dict(saved.facts["schedule"])
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate

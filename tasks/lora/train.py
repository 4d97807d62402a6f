"""Training a whole model or one LoRA, and what all training shares: options, batches, rates.

AdamW (betas 0.9 and 0.999), gradients clipped to a global norm, a schedule of transformers, the
loss averaged over the answer tokens of an optimiser step. No dropout and no global random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import get_scheduler

from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.checkpoint import Checkpoint, Saved
from tasks.lora.forward import label_losses
from tasks.lora.packing import ONE_PER_ROW, pack


@dataclass(frozen=True)
class Training:
    """The fields of `TrainingOptions` that a training loop reads."""

    learning_rate: float
    epochs: int
    batch_size: int
    accumulation: int
    schedule: str
    warmup_share: float
    max_grad_norm: float
    weight_decay: float


@dataclass
class Trained:
    """Loss per optimiser step (mean over answer tokens), tokens seen, samples cut to fit.

    computed: the positions that went through the model, padding included.
    """

    losses: list[float]
    tokens: int
    truncated: int
    computed: int = 0


class NotFinite(FloatingPointError):
    """A loss, a gradient or a weight is NaN or infinite; `trained` ends with that step."""

    def __init__(self, what: str, trained: Trained) -> None:
        super().__init__(f"{what} at step {len(trained.losses)}; lower the learning rate")
        self.trained = trained


@dataclass
class Outcome:
    """What training one LoRA for each of U users gave.

    flat [U, P]: the trained weights. losses: per user, per optimiser step. tokens: per user.
    failed: users whose loss or gradient became NaN or infinite; they stopped there, with the
    weights of the step before. computed: positions that went through the model.
    """

    flat: Tensor
    losses: list[list[float]]
    tokens: list[int]
    failed: list[int]
    computed: int = 0
    halved: int = 0

    @property
    def padding(self) -> float:
        """The share of computed positions that held no token."""
        return 1.0 - sum(self.tokens) / max(self.computed, 1)

    def saved(self, step: int, tensors: dict[str, Tensor], **facts: int) -> Saved:
        """The state to go on from: `tensors` and `facts` of the training, and what was counted."""
        losses = [loss for own in self.losses for loss in own]
        counted = {
            # As numbers, not text: a loss may be NaN, which JSON does not know.
            "losses": torch.tensor(losses, dtype=torch.float64),
            "steps": torch.tensor([len(own) for own in self.losses]),
            "tokens": torch.tensor(self.tokens),
        }
        numbers = {"failed": self.failed, "computed": self.computed, "halved": self.halved}
        return Saved(step, tensors | counted, numbers | facts)

    def restore(self, saved: Saved) -> None:
        """Put back what was counted."""
        parts = saved.tensors["losses"].split(saved.tensors["steps"].tolist())
        self.losses[:] = [part.tolist() for part in parts]
        self.tokens[:] = saved.tensors["tokens"].tolist()
        self.failed[:] = saved.facts["failed"]
        self.computed, self.halved = saved.facts["computed"], saved.facts["halved"]


def epochs(count: int, options: Training, seed: int) -> Iterator[list[list[int]]]:
    """Optimiser steps as micro-batches of sample indices; an epoch's last may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    size = options.batch_size
    for _ in range(options.epochs):
        order = torch.randperm(count, generator=generator).tolist()
        micro = [order[start : start + size] for start in range(0, count, size)]
        for start in range(0, len(micro), options.accumulation):
            yield micro[start : start + options.accumulation]


def batches_of(count: int, options: Training, seed: int) -> list[list[int]]:
    """Optimiser steps as sample indices, micro-batches joined."""
    return [[i for micro in step for i in micro] for step in epochs(count, options, seed)]


def learning_rates(options: Training, steps: int) -> list[float]:
    """The rate of each of `steps` optimiser steps, by transformers' schedules.

    Warm-up steps are rounded up, as there: with two steps the first has rate 0.
    """
    schedule = get_scheduler(
        "constant_with_warmup" if options.schedule == "constant" else options.schedule,
        torch.optim.SGD([torch.zeros(1)], lr=options.learning_rate),
        num_warmup_steps=math.ceil(options.warmup_share * steps),
        num_training_steps=steps,
    )
    return [options.learning_rate * schedule.lr_lambdas[0](step) for step in range(steps)]


def fit(
    base: Base,
    parameters: Sequence[torch.nn.Parameter],
    samples: Sequence[Encoded],
    steps: Sequence[Sequence[Sequence[int]]],
    options: Training,
    progress: Callable[[int, int], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Train `parameters` of the base model on `samples`.

    steps: per optimiser step its micro-batches, as indices of samples (`epochs`).
    `progress(done, total)` is called after each step. Training goes on from the state that
    `checkpoint` has. Raises ValueError without samples, NotFinite when training diverges.
    """
    if not samples:
        raise ValueError("fit needs at least one sample")
    model, pad = base.model, base.tokenizer.pad_token_id
    optimizer = torch.optim.AdamW(
        parameters, lr=options.learning_rate, weight_decay=options.weight_decay, foreach=True
    )
    rates = learning_rates(options, len(steps))
    trained = Trained([], 0, sum(sample.truncated for sample in samples))
    losses = trained.losses
    if saved := checkpoint.load(_weights(parameters)) if checkpoint else None:
        _restore(saved, parameters, optimizer)
        losses += saved.tensors["losses"].tolist()
        trained.tokens, trained.computed = saved.facts["tokens"], saved.facts["computed"]
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
            trained.tokens += packed.tokens
            trained.computed += packed.input_ids.numel()
        losses.append(total / labelled)
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        if not (math.isfinite(total) and torch.isfinite(norm)):
            raise NotFinite(f"the loss is {total}, its gradient {norm}", trained)
        for group in optimizer.param_groups:
            group["lr"] = rates[number]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if checkpoint and checkpoint.due():
            checkpoint.save(_kept(parameters, optimizer, trained))
        if progress:
            progress(number + 1, len(steps))
    if not all(torch.isfinite(parameter).all() for parameter in parameters):
        raise NotFinite("weights are not finite", trained)
    model.eval()
    return trained


def _weights(parameters: Sequence[torch.nn.Parameter]) -> dict[str, Tensor]:
    return {f"{number}.weight": one.detach() for number, one in enumerate(parameters)}


def _kept(
    parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer, trained: Trained
) -> Saved:
    moments = {
        f"{number}.{name}": tensor
        for number, state in optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }
    losses = torch.tensor(trained.losses, dtype=torch.float64)
    tensors = {**_weights(parameters), **moments, "losses": losses}
    return Saved(len(losses), tensors, {"tokens": trained.tokens, "computed": trained.computed})


def _restore(
    saved: Saved, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Put weights and AdamW's moments back."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in saved.tensors.items():
        number, _, part = name.partition(".")
        if part == "weight":
            parameters[int(number)].data.copy_(tensor)
        elif part:
            state.setdefault(int(number), {})[part] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})

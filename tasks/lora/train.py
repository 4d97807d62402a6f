"""Training a whole model or one LoRA, and what all trainings share: options, batches, rates.

AdamW (betas 0.9 and 0.999), gradients clipped to a global norm, a schedule of transformers. The
loss is the mean over the answer tokens of an optimiser step. No dropout, no global random state.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
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

    computed: the positions that went through the model, padding included. failed: if training ended
    early, what was NaN or infinite, and in which step.
    """

    losses: list[float]
    tokens: int
    truncated: int
    computed: int = 0
    failed: str = ""


@dataclass
class Outcome:
    """What training one LoRA for each of U users gave.

    flat [U, P]: the trained weights. losses: per user, per optimiser step. tokens: per user.
    failed: users whose loss or gradient became NaN or infinite; they stopped there, and keep the
    weights of the step before. computed: the positions that went through the model. halved: how
    often a micro-batch did not fit in memory.
    """

    flat: Tensor
    losses: list[list[float]]
    tokens: list[int]
    failed: list[int] = field(default_factory=list)
    computed: int = 0
    halved: int = 0

    def facts(self) -> dict[str, Any]:
        """All but the weights, for a checkpoint: `Outcome(flat, **facts)` undoes it."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "flat"}


def epochs(count: int, options: Training, seed: int) -> Iterator[list[list[int]]]:
    """Optimiser steps, each as micro-batches of sample indices; an epoch's last may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    size = options.batch_size
    for _ in range(options.epochs):
        order = torch.randperm(count, generator=generator).tolist()
        micro = [order[start : start + size] for start in range(0, count, size)]
        for start in range(0, len(micro), options.accumulation):
            yield micro[start : start + options.accumulation]


def learning_rates(options: Training, steps: int) -> list[float]:
    """The rate of each of `steps` optimiser steps, by transformers' schedules.

    Warm-up steps are rounded up, as transformers does: with two steps the first has rate 0.
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
    """Train `parameters` of the base model on `samples`. It ends early (`failed`) if it diverges.

    steps: per optimiser step its micro-batches, as indices of samples (`epochs`).
    `progress(done, total)` is called after each step. Training goes on from the state that
    `checkpoint` has.
    """
    optimizer = torch.optim.AdamW(
        parameters, lr=options.learning_rate, weight_decay=options.weight_decay, foreach=True
    )
    rates = learning_rates(options, len(steps))
    trained = Trained([], 0, sum(sample.truncated for sample in samples))
    if saved := checkpoint.load() if checkpoint else None:
        _restore(saved.tensors, parameters, optimizer)
        trained = Trained(**saved.facts)
    base.model.train()
    for number in range(len(trained.losses), len(steps)):
        loss = _backward(base, samples, steps[number], trained)
        trained.losses.append(loss)
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        if not (math.isfinite(loss) and torch.isfinite(norm)):
            trained.failed = f"the loss is {loss}, its gradient {norm} at step {number + 1}"
            break
        for group in optimizer.param_groups:
            group["lr"] = rates[number]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if checkpoint and checkpoint.due():
            checkpoint.save(Saved(number + 1, _state(parameters, optimizer), vars(trained)))
        if progress:
            progress(number + 1, len(steps))
    if not trained.failed and not all(torch.isfinite(one).all() for one in parameters):
        trained.failed = f"weights are not finite at step {len(trained.losses)}"
    base.model.eval()
    return trained


def _backward(
    base: Base, samples: Sequence[Encoded], step: Sequence[Sequence[int]], trained: Trained
) -> float:
    """Add the gradient of one optimiser step to the parameters. Returns the step's loss."""
    labels = sum(len(samples[i].answer) for i in chain(*step))
    total = 0.0
    for indices in step:
        # One "user" with all samples, each in a row of its own.
        packed = pack([[samples[i] for i in indices]], base.tokenizer.pad_token_id, ONE_PER_ROW)
        loss = label_losses(base, packed.to(base.device)).sum()
        (loss / labels).backward()
        total += loss.item()
        trained.tokens += packed.tokens
        trained.computed += packed.input_ids.numel()
    return total / labels


def _state(
    parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Weights and, after the first step, AdamW's moments, named `<number of parameter>.<name>`."""
    return {
        f"{number}.{name}": one
        for number, parameter in enumerate(parameters)
        for name, one in {"weight": parameter.detach(), **optimizer.state[parameter]}.items()
    }


def _restore(
    tensors: dict[str, Tensor],
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Undo `_state`."""
    state: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        owner, _, part = name.partition(".")
        state[int(owner)][part] = tensor
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter.copy_(state[number].pop("weight"))
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

"""What work costs: steps, tokens, FLOPs, memory and time, from lengths of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from tasks.config.options import TrainingOptions
from tasks.lora.cost import flops
from tasks.lora.grouped import Shapes
from tasks.plan.lengths import Lengths
from tasks.plan.model import PlannedModel


@dataclass
class Work:
    """One row of a plan.

    users: users or anchors. items: the questions they are asked. steps: optimiser steps, of all
    users together. tokens: as often as they go through the model. seconds: an estimate, for the
    plan's machine. memory: bytes of what stays there: weights, LoRAs, their optimiser, the bank; a
    pass takes up to half of what is left. disk: bytes in the store.
    """

    stage: str = ""
    method: str = ""
    users: int = 0
    items: int = 0
    steps: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0
    memory: int = 0
    disk: int = 0

    def __add__(self, other: Work) -> Work:
        """Two parts of one stage."""
        sums = ("users", "items", "steps", "tokens", "flops", "seconds", "disk")
        values = {name: getattr(self, name) + getattr(other, name) for name in sums}
        return replace(self, **values, memory=max(self.memory, other.memory))


@dataclass(frozen=True)
class TaskPlan:
    """What one LaMP task takes: all work in its order; notes: what was assumed or does not fit."""

    title: str
    users: dict[str, int]
    works: list[Work]
    notes: list[str]

    @property
    def rows(self) -> list[Work]:
        """The work of each stage and method together."""
        rows: dict[tuple[str, str], Work] = {}
        for work in self.works:
            key = (work.stage, work.method)
            rows[key] = rows.get(key, Work(*key)) + work
        return [work for work in rows.values() if work.users]


def passes(
    model: PlannedModel, samples: Sequence[Lengths], below: int = 0, own: int = 0, beside: int = 0,
    times: int = 1, backward: bool = False,
) -> Work:  # fmt: skip
    """All users' samples through the model, `times` over.

    below, own: numbers of one user's merged LoRA and of the user's own. beside: bytes that stay in
    memory beside the weights and the users' own LoRAs.
    """
    users, flat = len(samples), [*chain(*samples)]
    # Without a LoRA it is the gradient of a signature, which knows no checkpoints.
    again = model.checkpointing and own > 0
    done = times * flops(model.base.model, flat, below + own, backward, again)
    # In float32; beside what is trained stand its gradient and AdamW's two moments.
    loras = 4 * own * users * (4 if backward else 1)
    return Work(
        users=users,
        items=len(flat),
        tokens=times * sum(one.length for one in flat),
        flops=done,
        seconds=model.seconds(done),
        memory=model.weights + beside + loras,
    )


def likelihoods(model: PlannedModel, samples: Sequence[Lengths], width: int, times: int) -> Work:
    """All users' samples under each of `times` LoRAs: a bank of one of them at a time."""
    flat = [[*chain(*samples)]]
    return passes(model, flat, below=width, beside=2 * 4 * width, times=times)


def train(
    model: PlannedModel, options: TrainingOptions, samples: Sequence[Lengths], below: int = 0,
    beside: int = 0,
) -> Work:  # fmt: skip
    """Training one LoRA per user; below, beside: as of `passes`."""
    own = model.lora(options).width
    work = passes(model, samples, below, own, beside, options.epochs, backward=True)
    batches = [math.ceil(len(user) / options.batch_size) for user in samples]
    work.steps = options.epochs * sum(math.ceil(n / options.accumulation) for n in batches)
    return work


def adapter_bytes(shapes: Shapes) -> int:
    """A PEFT folder and its record: weights, and their names."""
    return 4 * shapes.width + sum(3 * len(name) + 220 for name in shapes.sizes) + 2000

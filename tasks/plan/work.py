"""What work costs: steps, tokens, FLOPs, memory and time, from lengths of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from humanize import metric

from tasks.config.options import TrainingOptions
from tasks.embed import CHUNK
from tasks.lamp.definitions import LampTask
from tasks.lora import cost
from tasks.lora.cost import NOTHING, Flops, Pass
from tasks.lora.grouped import Shapes
from tasks.lora.merge import KEPT_BYTES
from tasks.lora.passes import (
    answer_passes,
    blank,
    likelihood_passes,
    signature_passes,
    training_passes,
)
from tasks.lora.signature import POSITIONS, STATE_POSITIONS
from tasks.plan.lengths import Lengths, count_tokens
from tasks.plan.model import PlannedModel
from tasks.text.questions import User
from tasks.training import training_from


@dataclass
class Work:
    """One row of a plan.

    users: users or anchors. items: the questions they are asked. steps: optimiser steps, of all
    users together. tokens: as often as they go through the model. seconds: an estimate, for the
    plan's machine. memory: bytes of what stays there: weights, LoRAs, their optimiser, the bank; a
    pass takes up to half of what is left. disk: bytes in the store. note: what was assumed.
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
    note: str = ""

    def __add__(self, other: Work) -> Work:
        """Two parts of one stage."""
        sums = ("users", "items", "steps", "tokens", "flops", "seconds", "disk")
        values = {name: getattr(self, name) + getattr(other, name) for name in sums}
        return replace(self, **values, memory=max(self.memory, other.memory))


@dataclass(frozen=True)
class TaskPlan:
    """What one LaMP task takes: all work in its order, and what was assumed of lengths."""

    title: str
    users: dict[str, int]
    works: list[Work]
    assumed: list[str]

    @property
    def rows(self) -> list[Work]:
        """The work of each stage and method together."""
        rows: dict[tuple[str, str], Work] = {}
        for work in self.works:
            key = (work.stage, work.method)
            rows[key] = rows.get(key, Work(*key)) + work
        return [work for work in rows.values() if work.users]

    def notes(self, model: PlannedModel) -> list[str]:
        """What was assumed, and what does not fit."""
        said = [(f"{one.stage} {one.method}".strip(), one.note) for one in self.works if one.note]
        notes = self.assumed + [f"{name}: {note}" for name, note in said]
        most = max(work.memory for work in self.works)
        if model.gpu and most > model.machine.memory_gb * 1e9:
            notes.append(
                f"{metric(most, 'B')} is more than the machine has (plan.memory_gb): lower "
                "stacking.users_per_job or anchors.per_job"
            )
        return list(dict.fromkeys(notes))


@dataclass(frozen=True)
class Below:
    """The merged LoRAs under what is trained or asked: a bank of `anchors`, and how its members,
    `each` per user, are merged."""

    shapes: Shapes
    anchors: int
    each: int
    how: str = "exact"

    @property
    def merged(self) -> Shapes:
        """One user's merged LoRA."""
        times = self.each if self.how == "exact" else 1
        return Shapes(self.shapes.sizes, self.shapes.rank * times)

    def bytes(self, users: int) -> int:
        """The bank on the device, and the users' merged LoRAs where they are kept."""
        merged = 4 * self.merged.width * users
        kept = merged if merged <= KEPT_BYTES or self.how == "svd" else 0
        return 4 * self.shapes.width * self.anchors + kept


NO_BANK = Below(NOTHING, anchors=0, each=0)


def train(
    model: PlannedModel, options: TrainingOptions, samples: Sequence[Lengths],
    below: Below = NO_BANK,
) -> Work:  # fmt: skip
    """Training one LoRA per user, all users' at once, in an order of items that some seeds give."""
    shapes, taken = model.lora(options), below.bytes(len(samples))
    most = _positions(model, taken, model.checkpointing)
    seeds, how = range(len(samples)), training_from(options)
    steps = training_passes(samples, how, seeds, most, model.shape.packs)
    flops = Flops(model.shape, shapes, below.merged, model.checkpointing).training
    # Users' LoRAs, their gradients and AdamW's two moments, in float32.
    work = _work(model, samples, chain(*steps), flops, taken + 4 * 4 * shapes.width * len(samples))
    batches = [math.ceil(len(own) / options.batch_size) for own in samples]
    work.steps = options.epochs * sum(math.ceil(n / options.accumulation) for n in batches)
    work.tokens *= options.epochs
    return work


def pretrain(model: PlannedModel, samples: Sequence[Lengths], steps: int, batch_size: int) -> Work:
    """A whole model trained on some of the users' samples.

    Kaplan et al. 2020: six FLOPs per parameter and token, with the weights' own gradients.
    """
    work = _work(model, samples, (), lambda _: 0, 3 * model.weights)
    work.steps, work.tokens = steps, work.tokens * steps * batch_size // max(1, work.items)
    work.flops = 6 * model.shape.parameters * work.tokens
    work.seconds = model.seconds(work.flops)
    return work


def likelihoods(
    model: PlannedModel, samples: Sequence[Lengths], below: Below,
    options: TrainingOptions | None = None, times: int = 1,
) -> Work:  # fmt: skip
    """Log-likelihoods of all users' samples, `times` over; options: of the users' own LoRAs."""
    own, taken = _own(model, options), below.bytes(len(samples))
    most = cost.forward_limit(_positions(model, taken), model.gpu)
    passes = likelihood_passes(samples, most, model.shape.packs)
    flops = Flops(model.shape, own, below.merged).forward
    return _work(model, samples, passes, flops, taken + 4 * own.width * len(samples), times)


def answer(
    model: PlannedModel, questions: Sequence[Lengths], new: int, below: Below,
    options: TrainingOptions | None,
) -> Work:  # fmt: skip
    """Greedy answers of `new` tokens each, the most there may be, to all users' questions."""
    own, taken = _own(model, options), below.bytes(len(questions))
    passes = answer_passes(questions, new, cost.BATCH_FACTOR * _positions(model, taken))
    decode = partial(Flops(model.shape, own, below.merged).decode, new=new)
    work = _work(model, questions, passes, decode, taken + 4 * own.width * len(questions))
    work.tokens += work.items * new
    # All weights are read for each token.
    read = len(passes) * new * model.weights
    work.seconds += read / (model.machine.bandwidth_tb * 1e12)
    return work


def sign(
    model: PlannedModel, users: Sequence[Lengths], sizes: tuple[int, int], at_input: bool
) -> Work:
    """Signatures of users' items; `at_input`: with a backward pass."""
    most = _positions(model, 0) if at_input else POSITIONS
    parts = [[*chain(*users[start : start + CHUNK])] for start in range(0, len(users), CHUNK)]
    passes = [one for part in parts for one in signature_passes(part, most)]
    flops = partial(Flops(model.shape).signature, sizes=sizes, at_input=at_input)
    return _work(model, users, passes, flops)


def states(model: PlannedModel, task: LampTask, users: Sequence[User]) -> Work:
    """The base model's own states of the users' items: no output embedding."""
    base, items = model.base, chain(*(user["profile"] for user in users))
    texts = [task.whole(item["text"], item["answer"]) for item in items]
    ids = (base.tokenizer(text, split_special_tokens=True)["input_ids"] for text in texts)
    samples = [blank(min(base.max_tokens, len(one)), 0) for one in ids]
    passes = [replace(one, labels=0) for one in signature_passes(samples, STATE_POSITIONS)]
    return _work(model, [samples], passes, Flops(model.shape).forward)


def _work(
    model: PlannedModel, samples: Sequence[Lengths], passes: Iterable[Pass],
    flops: Callable[[Pass], int], beside: int = 0, times: int = 1,
) -> Work:  # fmt: skip
    """All users' samples in these passes, `times` over; beside: bytes beside the weights."""
    total = times * sum(map(flops, passes))
    return Work(
        users=len(samples),
        items=sum(map(len, samples)),
        tokens=times * sum(map(count_tokens, samples)),
        flops=total,
        seconds=model.seconds(total),
        memory=model.weights + beside,
    )


def _own(model: PlannedModel, options: TrainingOptions | None) -> Shapes:
    """The shapes of users' own LoRAs, if they have any."""
    return model.lora(options) if options else NOTHING


def _positions(model: PlannedModel, taken: int, checkpointing: bool = False) -> int:
    """Positions per micro-batch, when `taken` bytes stand beside the weights."""
    if not model.gpu:
        return cost.cpu_positions(model.shape)
    free = int(model.machine.memory_gb * 1e9) - model.weights - taken
    return cost.gpu_positions(model.shape, model.each, checkpointing, max(free, 0))

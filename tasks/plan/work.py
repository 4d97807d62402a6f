"""What one piece of work costs: steps, tokens, FLOPs, memory and time, from lengths of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from tasks.config.options import TrainingOptions
from tasks.embed import CHUNK
from tasks.lamp.definitions import LampTask
from tasks.lora import cost
from tasks.lora.cost import Flops, Loras, Pass
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
    users together. tokens: as often as they go through the model. memory: the most at once, bytes.
    seconds: an estimate, for the plan's machine. disk: what stays in the store, bytes. note: what
    was assumed.
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
class Below:
    """The merged LoRAs under what is trained or asked: a bank of `anchors`, and how its members,
    `each` per user, are merged."""

    shapes: Shapes
    anchors: int
    each: int
    how: str = "exact"

    @property
    def times(self) -> int:
        """The rank when merged, in those of an anchor's LoRA."""
        return self.each if self.how == "exact" else 1

    @property
    def ranks(self) -> dict[str, int]:
        """The rank on each layer when merged."""
        return dict.fromkeys(self.shapes.sizes, self.shapes.rank * self.times)

    def bytes(self, users: int) -> int:
        """The bank on the device, and the users' merged LoRAs where they are kept."""
        merged = 4 * self.shapes.width * users * self.times
        kept = merged if merged <= KEPT_BYTES or self.how == "svd" else 0
        return 4 * self.shapes.width * self.anchors + kept


NOTHING = Below(Shapes({}, 1), anchors=0, each=0)


def train(
    model: PlannedModel, options: TrainingOptions, samples: Sequence[Lengths],
    seeds: Sequence[int], checkpointing: bool, below: Below = NOTHING,
) -> Work:  # fmt: skip
    """Training one LoRA per user, all users' at once."""
    shapes, taken = model.lora(options), below.bytes(len(samples))
    loras = Loras(shapes, below.ranks, checkpointing)
    most = _positions(model, taken, checkpointing)
    steps = training_passes(samples, training_from(options), seeds, most, model.shape.packs)
    # Users' LoRAs, their gradients and AdamW's two moments, in float32.
    taken += 4 * 4 * shapes.width * len(samples)
    work = _work(
        model, samples, chain(*steps), Flops(model.shape, loras).training,
        lambda one: taken + cost.training_bytes(model.shape, one, loras, model.each),
    )  # fmt: skip
    batches = [math.ceil(len(own) / options.batch_size) for own in samples]
    work.steps = options.epochs * sum(math.ceil(n / options.accumulation) for n in batches)
    work.tokens *= options.epochs
    return work


def pretrain(model: PlannedModel, samples: Sequence[Lengths], steps: int, batch_size: int) -> Work:
    """A whole model trained on some of the users' samples.

    Kaplan et al. 2020: six FLOPs per parameter and token, with the weights' own gradients.
    """
    work = Work(users=len(samples), items=sum(map(len, samples)), steps=steps)
    work.tokens = sum(map(count_tokens, samples)) * steps * batch_size // max(1, work.items)
    work.flops = 6 * model.shape.parameters * work.tokens
    work.seconds, work.memory = model.seconds(work.flops), 4 * model.weights
    return work


def likelihoods(
    model: PlannedModel, samples: Sequence[Lengths], below: Below,
    options: TrainingOptions | None = None, times: int = 1,
) -> Work:  # fmt: skip
    """Log-likelihoods of all users' samples, `times` over; options: of the users' own LoRAs."""
    taken = below.bytes(len(samples))
    loras = Loras(model.lora(options) if options else None, below.ranks)
    most = cost.forward_limit(_positions(model, taken), model.gpu)
    passes = likelihood_passes(samples, most, model.shape.packs)
    return _work(
        model, samples, passes, Flops(model.shape, loras).forward,
        lambda one: taken + cost.forward_bytes(model.shape, one, model.each, loras, states=3),
        times,
    )  # fmt: skip


def answer(
    model: PlannedModel, questions: Sequence[Lengths], new: int, below: Below,
    options: TrainingOptions | None,
) -> Work:  # fmt: skip
    """Greedy answers of `new` tokens each, the most there may be, to all users' questions."""
    shape, taken = model.shape, below.bytes(len(questions))
    loras = Loras(model.lora(options) if options else None, below.ranks)
    passes = answer_passes(questions, new, cost.BATCH_FACTOR * _positions(model, taken))

    def needed(one: Pass) -> int:
        cache = 2 * model.each * shape.kv * shape.blocks * one.labels * (one.width + new)
        return taken + cache + cost.forward_bytes(shape, one, model.each, loras)

    decode = Flops(shape, loras).decode
    work = _work(model, questions, passes, lambda one: decode(one, new), needed)
    work.tokens += work.items * new
    # All weights are read for each token.
    read = len(passes) * new * model.weights
    work.seconds += read / (model.machine.bandwidth_tb * 1e12)
    return work


def sign(
    model: PlannedModel, users: Sequence[Lengths], sizes: tuple[int, int], at_input: bool
) -> Work:
    """Signatures of users' items; `at_input`: with a backward pass."""
    shape, flops = model.shape, Flops(model.shape, Loras())
    most = _positions(model, model.weights) if at_input else POSITIONS
    parts = [[*chain(*users[start : start + CHUNK])] for start in range(0, len(users), CHUNK)]

    def needed(one: Pass) -> int:
        forward = cost.forward_bytes(shape, one, model.each)
        if not at_input:
            return forward
        # As in training without any LoRA.
        kept = one.positions * cost.position_bytes(shape, model.each, False)
        return max(forward, kept + cost.loss_bytes(shape, one, model.each))

    passes = [one for part in parts for one in signature_passes(part, most)]
    return _work(model, users, passes, lambda one: flops.signature(one, sizes, at_input), needed)


def states(model: PlannedModel, task: LampTask, users: Sequence[User]) -> Work:
    """The base model's own states of the users' items: no output embedding."""
    base, items = model.base, chain(*(user["profile"] for user in users))
    texts = [task.whole(item["text"], item["answer"]) for item in items]
    ids = (base.tokenizer(text, split_special_tokens=True)["input_ids"] for text in texts)
    samples = [blank(min(base.max_tokens, len(one)), 0) for one in ids]
    passes = [replace(one, labels=0) for one in signature_passes(samples, STATE_POSITIONS)]
    forward = Flops(model.shape, Loras()).forward
    return _work(
        model, [samples], passes, forward,
        lambda one: cost.forward_bytes(model.shape, one, model.each),
    )  # fmt: skip


def _work(
    model: PlannedModel, samples: Sequence[Lengths], passes: Iterable[Pass],
    flops: Callable[[Pass], int], needed: Callable[[Pass], int], times: int = 1,
) -> Work:  # fmt: skip
    """All users' samples in these passes, `times` over; needed: bytes beside the weights."""
    passes = list(passes)
    total = times * sum(map(flops, passes))
    return Work(
        users=len(samples),
        items=sum(map(len, samples)),
        tokens=times * sum(map(count_tokens, samples)),
        flops=total,
        seconds=model.seconds(total),
        memory=model.weights + max(map(needed, {*passes}), default=0),
    )


def _positions(model: PlannedModel, taken: int, checkpointing: bool = False) -> int:
    """Positions per micro-batch, when `taken` bytes stand beside the weights."""
    if not model.gpu:
        return cost.cpu_positions(model.shape)
    free = int(model.machine.memory_gb * 1e9) - model.weights - taken
    return cost.gpu_positions(model.shape, model.each, checkpointing, max(free, 0))

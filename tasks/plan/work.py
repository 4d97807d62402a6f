"""What one piece of work costs: steps, tokens, FLOPs, memory and time, from lengths of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from tasks.config.options import TrainingOptions
from tasks.lora import cost
from tasks.lora.cost import Flops, Loras, Pass
from tasks.lora.grouped import Shapes
from tasks.lora.merge import KEPT_BYTES
from tasks.lora.passes import (
    answer_batches,
    blank,
    likelihood_passes,
    signature_passes,
    training_passes,
)
from tasks.lora.signature import POSITIONS, STATE_POSITIONS
from tasks.plan.lengths import Lengths, count_tokens
from tasks.plan.model import PlannedModel
from tasks.training import training_from


@dataclass
class Work:
    """One row of a plan.

    users: users or anchors. items: the questions they are asked. steps: optimiser steps, of all
    users together. tokens: as often as they go through the model. memory: the most at once, bytes.
    seconds: an estimate, for the plan's machine. disk: what stays in the store, bytes; of it
    `per_user` is what one few-shot user more would add. note: what was assumed.
    """

    stage: str
    method: str = ""
    users: int = 0
    items: int = 0
    steps: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0
    memory: int = 0
    disk: int = 0
    per_user: int = 0
    note: str = ""

    def __add__(self, other: Work) -> Work:
        """Two parts of one stage."""
        sums = ("users", "items", "steps", "tokens", "flops", "seconds", "disk")
        most = ("memory", "per_user")
        values = {name: getattr(self, name) + getattr(other, name) for name in sums}
        values |= {name: max(getattr(self, name), getattr(other, name)) for name in most}
        return replace(self, **values)


@dataclass(frozen=True)
class Below:
    """The merged LoRAs under what is trained or asked: a bank of `anchors`, and how its members,
    `each` per user, are merged."""

    shapes: Shapes
    anchors: int
    each: int
    how: str = "exact"

    @property
    def ranks(self) -> dict[str, int]:
        """The rank on each layer when merged."""
        times = self.each if self.how == "exact" else 1
        return dict.fromkeys(self.shapes.sizes, self.shapes.rank * times)

    def bytes(self, users: int) -> int:
        """The bank on the device, and the users' merged LoRAs where they are kept."""
        merged = 4 * self.shapes.width * users * (self.each if self.how == "exact" else 1)
        kept = merged if merged <= KEPT_BYTES or self.how == "svd" else 0
        return 4 * self.shapes.width * self.anchors + kept


NOTHING = Below(Shapes({}, 1), anchors=0, each=0)


def train(
    model: PlannedModel, stage: str, options: TrainingOptions, samples: Sequence[Lengths],
    seeds: Sequence[int], checkpointing: bool, below: Below = NOTHING,
) -> Work:  # fmt: skip
    """Training one LoRA per user, all users' at once."""
    shapes, taken = model.lora(options), below.bytes(len(samples))
    loras = Loras(shapes, below.ranks, checkpointing)
    most = _positions(model, taken, checkpointing)
    steps = training_passes(samples, training_from(options), seeds, most, model.shape.packs)
    taken += cost.optimiser_bytes(shapes.width, len(samples))
    work = _work(
        model, stage, samples, chain(*steps), Flops(model.shape, loras).training,
        lambda one: taken + cost.training_bytes(model.shape, one, loras, model.each),
    )  # fmt: skip
    batches = [math.ceil(len(own) / options.batch_size) for own in samples]
    work.steps = options.epochs * sum(math.ceil(n / options.accumulation) for n in batches)
    work.tokens *= options.epochs
    return work


def pretrain(model: PlannedModel, stage: str, samples: Sequence[Lengths], asked: int) -> Work:
    """A whole model trained on `asked` of the users' samples.

    Kaplan et al. 2020: six FLOPs per parameter and token, with the weights' own gradients.
    """
    work = _work(model, stage, samples, (), lambda _: 0, lambda _: 0)
    work.tokens = work.tokens * asked // max(1, work.items)
    work.flops = 6 * model.shape.parameters * work.tokens
    work.seconds, work.memory = model.seconds(work.flops), 4 * model.weights
    return work


def likelihoods(
    model: PlannedModel, stage: str, samples: Sequence[Lengths], below: Below,
    options: TrainingOptions | None = None, times: int = 1,
) -> Work:  # fmt: skip
    """Log-likelihoods of all users' samples, `times` over; options: of the users' own LoRAs."""
    taken = below.bytes(len(samples))
    loras = Loras(model.lora(options) if options else None, below.ranks)
    most = cost.forward_limit(_positions(model, taken, False), model.gpu)
    passes = likelihood_passes(samples, most, model.shape.packs)
    return _work(
        model, stage, samples, passes, Flops(model.shape, loras).forward,
        lambda one: taken + _forward(model, one, 3) + _factors(model, loras, one.users), times,
    )  # fmt: skip


def answer(
    model: PlannedModel, stage: str, questions: Sequence[Lengths], new: int, below: Below,
    options: TrainingOptions | None,
) -> Work:  # fmt: skip
    """Greedy answers of `new` tokens each, the most there may be, to all users' questions."""
    shape, taken = model.shape, below.bytes(len(questions))
    loras = Loras(model.lora(options) if options else None, below.ranks)
    batches = answer_batches(questions, new, cost.BATCH_FACTOR * _positions(model, taken, False))
    passes = [Pass(1, rows, prompt, rows * prompt, rows) for rows, prompt in batches]

    def needed(one: Pass) -> int:
        cache = 2 * model.each * shape.kv * shape.blocks * one.rows * (one.width + new)
        # As many users as there are, where it is not said how many have these rows.
        users = min(len(questions), one.rows)
        return taken + cache + _forward(model, one) + _factors(model, loras, users)

    decode = Flops(shape, loras).decode
    work = _work(
        model, stage, questions, passes, lambda one: decode(one.rows, one.width, new), needed
    )
    work.tokens += work.items * new
    # All weights are read for each token.
    read = len(passes) * new * model.weights
    work.seconds += read / (model.machine.bandwidth_tb * 1e12)
    return work


def sign(
    model: PlannedModel, stage: str, users: Sequence[Lengths], chunk: int, sizes: tuple[int, int],
    at_input: bool,
) -> Work:  # fmt: skip
    """Signatures of users' items, `chunk` users at a time; `at_input`: with a backward pass."""
    shape, flops = model.shape, Flops(model.shape, Loras())
    most = _positions(model, model.weights, False) if at_input else POSITIONS
    count = flops.input_signature if at_input else flops.signature
    parts = [[*chain(*users[start : start + chunk])] for start in range(0, len(users), chunk)]

    def needed(one: Pass) -> int:
        if not at_input:
            return _forward(model, one)
        # As in training without any LoRA.
        kept = one.positions * cost.position_bytes(shape, model.each, False)
        return max(_forward(model, one), kept + cost.loss_bytes(shape, one, model.each))

    passes = [one for part in parts for one in signature_passes(part, most)]
    return _work(model, stage, users, passes, lambda one: count(one, *sizes), needed)


def states(model: PlannedModel, stage: str, texts: Sequence[int]) -> Work:
    """The base model's own states of texts of these lengths: no output embedding."""
    samples = [blank(length, 0) for length in texts]
    passes = [replace(one, labels=0) for one in signature_passes(samples, STATE_POSITIONS)]
    forward = Flops(model.shape, Loras()).forward
    return _work(model, stage, [samples], passes, forward, lambda one: _forward(model, one))


def _work(
    model: PlannedModel, stage: str, samples: Sequence[Lengths], passes: Iterable[Pass],
    flops: Callable[[Pass], int], needed: Callable[[Pass], int], times: int = 1,
) -> Work:  # fmt: skip
    """All users' samples in these passes, `times` over; needed: bytes beside the weights."""
    passes = list(passes)
    total = times * sum(map(flops, passes))
    return Work(
        stage,
        users=len(samples),
        items=sum(map(len, samples)),
        tokens=times * sum(map(count_tokens, samples)),
        flops=total,
        seconds=model.seconds(total),
        memory=model.weights + max(map(needed, {*passes}), default=0),
    )


def _positions(model: PlannedModel, taken: int, checkpointing: bool) -> int:
    """Positions per micro-batch, when `taken` bytes stand beside the weights."""
    if not model.gpu:
        return cost.cpu_positions(model.shape)
    free = int(model.machine.memory_gb * 1e9) - model.weights - taken
    return cost.gpu_positions(model.shape, model.each, checkpointing, max(free, 0))


def _forward(model: PlannedModel, one: Pass, states: int = 5) -> int:
    """Bytes of one block at work; the logits, their float32 copy if they are narrower, log-softmax.

    states: copies of the hidden states; of padded rows, which have a mask, attention makes more.
    """
    shape, each = model.shape, model.each
    block = each * (states * shape.hidden + 2 * (shape.attention + shape.kv) + 3 * shape.wide)
    return one.positions * block + one.labels * shape.head[1] * (each + (8 if each < 4 else 4))


def _factors(model: PlannedModel, loras: Loras, users: int) -> int:
    """Users' LoRAs in a pass: their own, the pass's copy of both parts, and these side by side."""
    own = loras.trained.width if loras.trained else 0
    return 4 * users * (3 * own + 2 * loras.below_width(model.shape))

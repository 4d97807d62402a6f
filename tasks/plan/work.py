"""What one stage costs: steps, tokens, FLOPs, memory, time and disk, from lengths of samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tasks.lora.cost import (
    BATCH_FACTOR,
    Flops,
    Loras,
    Pass,
    cpu_positions,
    forward_limit,
    gpu_positions,
    loss_bytes,
    optimiser_bytes,
    position_bytes,
    training_bytes,
)
from tasks.lora.merge import KEPT_BYTES
from tasks.lora.passes import answer_batches, likelihood_passes, signature_passes, training_passes
from tasks.lora.signature import POSITIONS
from tasks.meta_lora import recipe_of
from tasks.options import TrainingOptions
from tasks.plan.lengths import Lengths
from tasks.plan.model import Planned


@dataclass
class Work:
    """One row of a plan.

    users: users or anchors. items: the questions they are asked. steps: optimiser steps, of all
    users together. tokens: as often as they go through the model. memory: the most at once, bytes.
    seconds: an estimate, for the plan's machine. disk: what stays in the store, bytes; of it
    `per_user` is what one few-shot user more would add.
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


@dataclass(frozen=True)
class Below:
    """The merged LoRAs under what is trained or asked: a bank of `anchors` of `rank`, and how its
    members, `each` per user, are merged."""

    sizes: dict[str, tuple[int, int]]
    rank: int
    anchors: int
    each: int
    how: str

    @property
    def merged_rank(self) -> int:
        return self.rank * self.each if self.how == "exact" else self.rank

    @property
    def ranks(self) -> dict[str, int]:
        return dict.fromkeys(self.sizes, self.merged_rank)

    def bytes(self, users: int) -> int:
        """The bank on the device, and the users' merged LoRAs where they are kept."""
        numbers = 4 * self.rank * sum(map(sum, self.sizes.values()))
        merged = numbers * self.merged_rank // self.rank * users
        kept = merged if merged <= KEPT_BYTES or self.how == "svd" else 0
        return numbers * self.anchors + kept


def positions(planned: Planned, taken: int, checkpointing: bool) -> int:
    """Positions per micro-batch, when `taken` bytes stand beside the weights."""
    if not planned.gpu:
        return cpu_positions(planned.shape)
    free = int(planned.machine.memory_gb * 1e9) - planned.weights - taken
    return gpu_positions(planned.shape, planned.each, checkpointing, max(free, 0))


def train(
    planned: Planned,
    stage: str,
    method: str,
    how: TrainingOptions,
    jobs: Iterable[tuple[Sequence[Lengths], Sequence[int]]],
    checkpointing: bool,
    below: Below | None = None,
) -> Work:
    """Training one LoRA per user, job by job. jobs: the users' samples and their seeds."""
    shapes = planned.lora(how)
    loras = Loras(shapes, below.ranks if below else None, checkpointing)
    recipe, costs = recipe_of(how), Flops(planned.shape, loras)
    done = Work(stage, method)
    for samples, seeds in jobs:
        taken = below.bytes(len(samples)) if below else 0
        most = positions(planned, taken, checkpointing)
        needed = 0
        for passes in training_passes(samples, recipe, seeds, most, planned.shape.packs):
            for one in passes:
                done.flops += costs.training(one)
                needed = max(needed, training_bytes(planned.shape, one, loras, planned.each))
        for own in samples:
            batches = math.ceil(len(own) / how.batch_size)
            done.steps += how.epochs * math.ceil(batches / how.accumulation)
            done.tokens += how.epochs * tokens(own)
            done.items += len(own)
        done.users += len(samples)
        held = planned.weights + taken + optimiser_bytes(shapes.width, len(samples))
        done.memory = max(done.memory, held + needed)
    done.seconds = compute_seconds(planned, done.flops)
    return done


def likelihoods(
    planned: Planned,
    stage: str,
    samples: Sequence[Lengths],
    below: Below | None,
    times: int,
    how: TrainingOptions | None = None,
) -> Work:
    """Log-likelihoods of all users' samples, `times` over, with the users' LoRAs."""
    taken = below.bytes(len(samples)) if below else 0
    most = forward_limit(positions(planned, taken, False), planned.gpu)
    passes = likelihood_passes(samples, most, planned.shape.packs)
    loras = Loras(planned.lora(how) if how else None, below.ranks if below else None)
    flops = times * sum(map(Flops(planned.shape, loras).forward, passes))
    return Work(
        stage,
        users=len(samples),
        items=sum(map(len, samples)),
        tokens=times * sum(map(tokens, samples)),
        flops=flops,
        seconds=compute_seconds(planned, flops),
        memory=planned.weights
        + taken
        + max(
            forward_bytes(planned, one, padded=False) + _factors(planned, loras, one.users)
            for one in passes
        ),
    )


def answer(
    planned: Planned,
    jobs: Iterable[Sequence[Lengths]],
    new: int,
    below: Below | None,
    how: TrainingOptions | None,
) -> Work:
    """Greedy answers of `new` tokens each, the most there may be; jobs: the users' questions."""
    shape = planned.shape
    loras = Loras(planned.lora(how) if how else None, below.ranks if below else None)
    done, costs = Work("scoring"), Flops(shape, loras)
    read = 0
    for questions in jobs:
        taken = below.bytes(len(questions)) if below else 0
        most = BATCH_FACTOR * positions(planned, taken, False)
        for rows, prompt in answer_batches(questions, new, most):
            done.flops += costs.decode(rows, prompt, new)
            read += new * planned.weights
            cache = 2 * planned.each * shape.kv * shape.blocks * rows * (prompt + new)
            one = Pass(1, rows, prompt, rows * prompt, rows)
            # As many users as there are, where it is not said how many have these rows.
            users = min(len(questions), rows)
            needed = cache + forward_bytes(planned, one) + _factors(planned, loras, users)
            done.memory = max(done.memory, planned.weights + taken + needed)
        done.users += len(questions)
        done.items += sum(map(len, questions))
        done.tokens += sum(len(one.prompt) + new for own in questions for one in own)
    done.seconds = compute_seconds(planned, done.flops) + read / (
        planned.machine.bandwidth_tb * 1e12
    )
    return done


def sign(
    planned: Planned,
    users: Sequence[Lengths],
    chunk: int,
    vocabulary: int,
    hidden: int,
    at_input: bool = False,
) -> Work:
    """Signatures of users' items, `chunk` users at a time; `at_input`: with a backward pass."""
    done, costs = Work("embedding", users=len(users)), Flops(planned.shape, Loras())
    most = positions(planned, planned.weights, False) if at_input else POSITIONS
    count = costs.input_signature if at_input else costs.signature
    for start in range(0, len(users), chunk):
        flat = [one for own in users[start : start + chunk] for one in own]
        for one in signature_passes(flat, most):
            done.flops += count(one, vocabulary, hidden)
            needed = forward_bytes(planned, one)
            if at_input:
                # As in training without any LoRA.
                kept = one.positions * position_bytes(planned.shape, planned.each, False)
                needed = max(needed, kept + loss_bytes(planned.shape, one, planned.each))
            done.memory = max(done.memory, planned.weights + needed)
        done.items += len(flat)
        done.tokens += tokens(flat)
    done.seconds = compute_seconds(planned, done.flops)
    return done


def added(one: Work, other: Work) -> Work:
    """Two parts of one stage as one."""
    sums = ("users", "items", "steps", "tokens", "flops", "seconds", "disk")
    total = {name: getattr(one, name) + getattr(other, name) for name in sums}
    return replace(one, memory=max(one.memory, other.memory), **total)


def tokens(samples: Lengths) -> int:
    return sum(len(one.prompt) + len(one.answer) for one in samples)


def compute_seconds(planned: Planned, flops: int) -> float:
    return flops / (planned.machine.peak_tflops * 1e12 * planned.machine.mfu)


def _factors(planned: Planned, loras: Loras, users: int) -> int:
    """Users' LoRAs in a pass: their own, the pass's copy of both parts, and these side by side."""
    own = loras.trained.width if loras.trained else 0
    return 4 * users * (3 * own + 2 * loras.below_width(planned.shape))


def forward_bytes(planned: Planned, done: Pass, padded: bool = True) -> int:
    """One block at work; the logits, their float32 copy if they are narrower, and log-softmax."""
    shape, each = planned.shape, planned.each
    # Padded rows have a mask, with which attention makes more.
    states = (5 if padded else 3) * shape.hidden
    block = each * (states + 2 * shape.attention + 2 * shape.kv + 3 * shape.wide)
    return done.positions * block + done.labels * shape.head[1] * (each + (8 if each < 4 else 4))

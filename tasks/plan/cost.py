"""What work costs: steps, tokens, FLOPs, memory and time, from lengths of users' samples."""

import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, cycle, islice
from typing import NamedTuple, Self

import polars as pl

from tasks.config.options import AnchorOptions, TrainingOptions
from tasks.embed import WHITENED, Embedding
from tasks.lamp.tables import row_groups
from tasks.lora.batches import Encoded
from tasks.lora.cost import flops, widths_of
from tasks.lora.grouped import Shapes
from tasks.plan.model import PlannedModel
from tasks.record import File, derive_seed
from tasks.results.models import Questions
from tasks.results.store import store
from tasks.text.questions import User
from tasks.text.tokens import Kind, samples_of
from tasks.users import Users, each_user

# One user's samples, as blank ones of their lengths.
Lengths = list[Encoded]
# user_id and `Counts`, of a table of users.
COUNTS = (
    pl.col("user_id"),
    pl.col("profile").list.len(),
    pl.col("query").list.len().alias("queries"),
    pl.col("query").list.eval(pl.element().struct.field("gold").str.len_chars()).list.sum(),
)


@lru_cache(maxsize=65_536)
def blank(prompt: int, answer: int) -> Encoded:
    """A sample of these lengths, of no tokens in particular."""
    return Encoded([0] * prompt, [0] * answer)


def assumed_clusters(options: AnchorOptions, count: int, seed: int) -> list[int]:
    """The candidates' clusters, dealt at random: as many as anchors are asked for.

    Where whole clusters are anchors, as many as the root of half the candidates.
    """
    number = min(options.count, count)
    if options.train_on != "user":
        number = max(1, round((count / 2) ** 0.5))
    labels = [place % number for place in range(count)]
    random.Random(derive_seed(seed, "plan", "clusters")).shuffle(labels)
    return labels


class Counts(NamedTuple):
    """What a plan keeps of a user: profile items, queries, characters of their gold answers."""

    items: int
    queries: int
    gold: int


class Measure:
    """Lengths of users' samples, by the model's tokenizer.

    About `plan.max_items` profile items or queries of a table are tokenised at most; the users
    between those get their lengths in turn. notes: where that is so. kept: about how many bytes the
    tokens of each user take in the store (tasks/text/tokens.py).
    """

    def __init__(self, model: PlannedModel) -> None:
        self.model, self.notes = model, list[str]()
        self.kept: dict[tuple[object, ...], int] = {}
        self._users: dict[File, dict[str, Counts]] = {}
        self._lengths: dict[object, dict[str, Lengths]] = {}

    def users(self, table: File) -> dict[str, Counts]:
        """What there is of the users of a table, by id; texts are not kept."""
        if table not in self._users:
            self._users[table] = {
                user_id: Counts(*numbers)
                for part in row_groups(store().path(table))
                for user_id, *numbers in pl.DataFrame(pl.from_arrow(part)).select(COUNTS).rows()
            }
        return self._users[table]

    def records(self, table: File, places: Collection[int]) -> Iterable[User]:
        """The users of a table at these places."""
        return Users((table,), places)

    def tokens(
        self, kind: Kind, questions: Questions, table: File, ids: Iterable[str] = ()
    ) -> list[Lengths]:
        """The lengths of these users' samples of a kind; without ids of all in the table."""
        key = (kind, questions, table)
        if key not in self._lengths:
            self._lengths[key] = lengths = self._measured(kind, questions, table)
            # By user: base users may be candidates, too, and are kept once.
            for user_id, samples in lengths.items():
                tokens = sum(one.length for one in samples)
                self.kept[kind, questions, user_id] = 4 * tokens + 13 * len(samples) + 100
        lengths = self._lengths[key]  # looked up once: a key takes as long as some users
        return [lengths[user_id] for user_id in ids or self.users(table)]

    def _measured(self, kind: Kind, questions: Questions, table: File) -> dict[str, Lengths]:
        users = self.users(table)
        counts = [one.items if kind == "profile" else one.queries for one in users.values()]
        places = range(0, len(users), max(1, math.ceil(sum(counts) / self.model.machine.max_items)))
        looked = {
            user["user_id"]: [
                blank(len(one.prompt), len(one.answer))
                for one in samples_of(questions, self.model.base, kind, user)
            ]
            for user in self.records(table, places)
        }
        pool, asked = [*chain(*looked.values())], sum(counts[place] for place in places)
        if len(looked) < len(users):
            self.notes.append(
                f"{asked} of {sum(counts)} {'profile items' if kind == 'profile' else 'queries'} "
                f"of {len(users)} users were looked at, the others are taken to be as long "
                "(plan.max_items)"
            )
        # A query has a sample for each label where these are compared.
        others, each = cycle(pool), len(pool) // max(1, asked)
        return {
            user_id: looked[user_id] if user_id in looked else [*islice(others, each * count)]
            for user_id, count in zip(users, counts, strict=True)
        }


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

    def __add__(self, other: Self) -> Self:
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
    model: PlannedModel, samples: Sequence[Lengths], below: int = 0, stacked: int = 0,
    beside: int = 0, times: int = 1, backward: bool = False,
) -> Work:  # fmt: skip
    """All users' samples through the model, `times` over.

    below, stacked: numbers of one user's merged LoRA and of the one stacked on it. beside: bytes
    that stay in memory beside the weights and the stacked LoRAs.
    """
    users, flat = len(samples), [*chain(*samples)]
    # Without a LoRA it is the gradient of a signature, which knows no checkpoints.
    again = model.checkpointing and stacked > 0
    done = times * flops(model.base.model, flat, below + stacked, backward, again)
    # In float32; beside what is trained stand its gradient and AdamW's two moments.
    loras = 4 * stacked * users * (4 if backward else 1)
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
    width = model.lora(options).width
    work = passes(model, samples, below, width, beside, options.epochs, backward=True)
    batches = [math.ceil(len(user) / options.batch_size) for user in samples]
    work.steps = options.epochs * sum(math.ceil(n / options.accumulation) for n in batches)
    return work


def embedding(
    measure: Measure, method: Embedding, counts: Mapping[File, int], new: Collection[File]
) -> tuple[Work, int]:
    """What it takes to embed the users of new tables, and the numbers of a vector.

    counts: users of all tables, in the order of roles.
    """
    model, options, work, width = measure.model, method.options, Work(), 0
    if questions := method.questions:
        at_input = options.embedding == "input_signature"
        each = [
            zip(measure.users(table), measure.tokens("profile", questions, table), strict=True)
            for table in new
        ]
        # Base users may be candidates, too, and are embedded once.
        samples = [*dict(chain(*each)).values()]
        vocabulary, hidden = model.base.model.get_output_embeddings().weight.shape
        width = min(options.signature_vocabulary, vocabulary) * min(
            options.signature_hidden, hidden
        )
        first = next(table for table, count in counts.items() if count)
        whitened = at_input and first in new
        if whitened:
            # Whitening asks the first users again.
            samples += measure.tokens("profile", questions, first)[:WHITENED]
        work = passes(model, samples, backward=at_input)
        work.disk = whitened * 4 * width**2
    elif method.encoder:
        measure.notes.append(
            f"embedding: the work of {method.encoder.model} is small and not counted"
        )
    else:
        texts = chain(*map(method.texts, chain(*map(each_user, new))))
        ids = (model.base.tokenizer(one, split_special_tokens=True)["input_ids"] for one in texts)
        states = [blank(min(model.base.max_tokens, len(one)), 0) for one in ids]
        width, work = widths_of(model.base.model).hidden, passes(model, [states])
    work.users = len({user_id for table in new for user_id in measure.users(table)})
    return work, width


def adapter_bytes(shapes: Shapes) -> int:
    """A PEFT folder and its record: weights, and their names."""
    return 4 * shapes.width + sum(3 * len(name) + 220 for name in shapes.sizes) + 2000

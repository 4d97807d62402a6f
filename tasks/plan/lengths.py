"""The data as a plan sees it: lengths of samples in tokens, and clusters that are assumed."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import chain, cycle, islice
from typing import NamedTuple

import polars as pl

from tasks.config.options import AnchorOptions
from tasks.config.task import derive_seed
from tasks.lamp.tables import row_groups
from tasks.lora.batches import Encoded
from tasks.plan.model import PlannedModel
from tasks.prepare import Users
from tasks.record import File
from tasks.results.models import Questions
from tasks.results.store import store
from tasks.text.questions import User
from tasks.text.tokens import Kind, samples_of

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

    Of a table about `plan.max_items` profile items or queries at most are looked at; users between
    those get lengths of theirs in turn. notes: where that is so. kept: bytes that the tokens take
    in the store (tasks/text/tokens.py), about.
    """

    def __init__(self, model: PlannedModel) -> None:
        self.model, self.notes, self.kept = model, list[str](), 0
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
            self._lengths[key] = found = self._measured(kind, questions, table)
            samples = sum(map(len, found.values()))
            tokens = sum(one.length for own in found.values() for one in own)
            self.kept += 4 * tokens + 13 * samples + 100 * len(found)
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

"""The data as a plan sees it: lengths of samples in tokens, and clusters that are assumed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from itertools import chain, cycle, islice

from tasks.config.options import AnchorOptions
from tasks.config.task import derive_seed
from tasks.lora.batches import Encoded
from tasks.lora.passes import blank
from tasks.plan.model import PlannedModel
from tasks.prepare import users_of
from tasks.record import File
from tasks.results.models import Questions
from tasks.text.questions import User
from tasks.text.tokens import Kind, samples_of

# One user's samples, as blank ones of their lengths.
Lengths = list[Encoded]


def count_tokens(samples: Iterable[Encoded]) -> int:
    return sum(one.length for one in samples)


def assumed_clusters(options: AnchorOptions, count: int, seed: int) -> tuple[list[int], int]:
    """The candidates' clusters, dealt at random, and how many: one per anchor that is asked for.

    Where whole clusters are anchors, as many as the root of half the candidates.
    """
    number = min(options.count, count)
    if options.train_on != "user":
        number = max(1, round((count / 2) ** 0.5))
    labels = [place % number for place in range(count)]
    random.Random(derive_seed(seed, "plan", "clusters")).shuffle(labels)
    return labels, number


class Measure:
    """Lengths of users' samples, by the model's tokenizer.

    Of a table about `plan.max_items` profile items at most are looked at; users between those get
    lengths of theirs in turn. notes: where that is so. measured: per kind, questions and table.
    """

    def __init__(self, model: PlannedModel) -> None:
        self.model, self.notes = model, list[str]()
        self.measured: dict[object, dict[str, Lengths]] = {}
        self._users: dict[str, dict[str, User]] = {}

    def users(self, table: File) -> dict[str, User]:
        """The users of a table, by id."""
        if table.sha256 not in self._users:
            self._users[table.sha256] = {user["user_id"]: user for user in users_of(table)}
        return self._users[table.sha256]

    def tokens(
        self, kind: Kind, questions: Questions, table: File, ids: Iterable[str] = ()
    ) -> list[Lengths]:
        """The lengths of these users' samples of a kind; without ids of all in the table."""
        key = (kind, questions, table.sha256)
        if key not in self.measured:
            self.measured[key] = self._lengths(kind, questions, self.users(table))
        return [self.measured[key][user_id] for user_id in ids or self.users(table)]

    @property
    def kept(self) -> int:
        """Bytes that the tokens take in the store (tasks/text/tokens.py), about."""
        each = chain(*(known.values() for known in self.measured.values()))
        return sum(4 * count_tokens(own) + 13 * len(own) + 100 for own in each)

    def _lengths(
        self, kind: Kind, questions: Questions, users: dict[str, User]
    ) -> dict[str, Lengths]:
        items, most = sum(len(u["profile"]) for u in users.values()), self.model.machine.max_items
        stride = max(1, math.ceil(items / most)) if kind == "profile" else 1
        looked = {
            user_id: [
                blank(len(one.prompt), len(one.answer))
                for one in samples_of(questions, self.model.base, kind, users[user_id])
            ]
            for user_id in list(users)[::stride]
        }
        if stride == 1:
            return looked
        pool = [*chain(*looked.values())]
        self.notes.append(
            f"{len(pool)} of {items} profile items of {len(users)} users were looked at, the "
            "others are taken to be as long (plan.max_items)"
        )
        others = cycle(pool)
        return {
            user_id: looked.get(user_id) or list(islice(others, len(user["profile"])))
            for user_id, user in users.items()
        }

"""The data as a plan sees it: lengths of samples in tokens, and clusters that are assumed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain, cycle, islice

from tasks.config.options import AnchorOptions
from tasks.config.task import derive_seed
from tasks.lora.batches import Encoded
from tasks.plan.model import PlannedModel
from tasks.prepare import users_of
from tasks.record import File
from tasks.results.models import Questions
from tasks.text.questions import User
from tasks.text.tokens import Kind, samples_of

# One user's samples, as blank ones of their lengths.
Lengths = list[Encoded]


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


class Measure:
    """Lengths of users' samples, by the model's tokenizer.

    Of a table about `plan.max_items` profile items at most are looked at; users between those get
    lengths of theirs in turn. notes: where that is so. kept: bytes that the tokens take in the
    store (tasks/text/tokens.py), about.
    """

    def __init__(self, model: PlannedModel) -> None:
        self.model, self.notes, self.kept = model, list[str](), 0
        self._users: dict[File, dict[str, User]] = {}
        self._lengths: dict[object, dict[str, Lengths]] = {}

    def users(self, table: File) -> dict[str, User]:
        """The users of a table, by id."""
        if table not in self._users:
            self._users[table] = {user["user_id"]: user for user in users_of(table)}
        return self._users[table]

    def tokens(
        self, kind: Kind, questions: Questions, table: File, ids: Iterable[str] = ()
    ) -> list[Lengths]:
        """The lengths of these users' samples of a kind; without ids of all in the table."""
        key, users = (kind, questions, table), self.users(table)
        if key not in self._lengths:
            self._lengths[key] = found = self._measured(kind, questions, users)
            each = [one.length for own in found.values() for one in own]
            self.kept += 4 * sum(each) + 13 * len(each) + 100 * len(found)
        return [self._lengths[key][user_id] for user_id in ids or users]

    def _measured(
        self, kind: Kind, questions: Questions, users: dict[str, User]
    ) -> dict[str, Lengths]:
        items = sum(len(user["profile"]) for user in users.values())
        stride = math.ceil(items / self.model.machine.max_items) if kind == "profile" else 1
        looked = {
            user_id: [
                blank(len(one.prompt), len(one.answer))
                for one in samples_of(questions, self.model.base, kind, users[user_id])
            ]
            for user_id in [*users][:: max(1, stride)]
        }
        pool = [*chain(*looked.values())]
        if len(looked) < len(users):
            self.notes.append(
                f"{len(pool)} of {items} profile items of {len(users)} users were looked at, the "
                "others are taken to be as long (plan.max_items)"
            )
        others = cycle(pool)
        return {
            user_id: looked[user_id]
            if user_id in looked
            else [*islice(others, len(one["profile"]))]
            for user_id, one in users.items()
        }

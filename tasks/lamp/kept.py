"""Which of a user's items and queries are kept. The others are dropped and counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress

from tasks.lamp import citations
from tasks.lamp.definitions import LampTask
from tasks.lamp.tables import Records

EMPTY_ITEM = "profile item with empty text or answer"
DUPLICATE_ITEM = "profile item that stands twice in one profile"
UNKNOWN_LABEL = "profile item with a label outside the task's set"
NO_NEGATIVE = "paper without another one of another citation to ask it against"
EMPTY_QUERY = "query with empty input or gold"
UNKNOWN_GOLD = "query with a gold outside the task's set"
EMPTY_USER = "user with no profile items left"
ORPHAN_QUERY = "query of a user with no profile items left"


class Kept:
    """Drops what cannot be used. dropped: reason -> how many items, queries or users so far."""

    def __init__(self, task: LampTask) -> None:
        self.task = task
        self.dropped: Counter[str] = Counter()

    def items(self, items: Iterable[tuple[str, str, str]]) -> Records:
        """The usable of some items (id, text, answer); an item that stands twice is kept once."""
        labels = self.task.labels
        if labels and self.task.items == "built":
            labels = (*labels, citations.UNASKED)
        kept: dict[tuple[str, str], str] = {}
        for item_id, body, answer in items:
            answer = self._answer(answer)
            if not body.strip() or not answer.strip():
                self.dropped[EMPTY_ITEM] += 1
            elif labels and answer not in labels:
                self.dropped[UNKNOWN_LABEL] += 1
            elif (body, answer) in kept:
                self.dropped[DUPLICATE_ITEM] += 1
            else:
                kept[body, answer] = item_id
        return Records(list(kept.values()), [t for t, _ in kept], [answer for _, answer in kept])

    def queries(self, queries: list[tuple[str, str, str]]) -> Records:
        """The usable of some queries (id, input, gold)."""
        kept = Records([], [], [])
        for query_id, question, gold in queries:
            gold = self._answer(gold)
            if not question.strip() or not gold.strip():
                self.dropped[EMPTY_QUERY] += 1
            elif self.task.labels and gold not in self.task.labels:
                self.dropped[UNKNOWN_GOLD] += 1
            else:
                for held, value in zip(kept, (query_id, question, gold), strict=True):
                    held.append(value)
        return kept

    def _answer(self, answer: str) -> str:
        """A label stripped, as LaMP scores it, and a rating "4.0" as "4"; free text as it is."""
        if answer in self.task.labels:
            return answer
        if self.task.kind == "rating":
            with suppress(ValueError):
                rating = float(answer)
                return str(int(rating)) if rating.is_integer() else answer.strip()
        return answer.strip() if self.task.labels else answer

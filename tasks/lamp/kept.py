"""Which of the users' items and queries are kept. The others are dropped and counted by reason."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from typing import NamedTuple

import polars as pl

from tasks.lamp.content import WHITE_SPACE
from tasks.lamp.definitions import LampTask

EMPTY_ITEM = "profile item with empty text or answer"
DUPLICATE_ITEM = "profile item that stands twice in one profile"
UNKNOWN_LABEL = "profile item with a label outside the task's set"
NO_NEGATIVE = "paper without another one of another citation to ask it against"
EMPTY_QUERY = "query with empty input or gold"
UNKNOWN_GOLD = "query with a gold outside the task's set"
EMPTY_USER = "user with no profile items left"
ORPHAN_QUERY = "query of a user with no profile items left"


class Reasons(NamedTuple):
    """What is counted for which fault; twice None: a row may stand twice."""

    empty: str
    unknown: str
    twice: str | None


ITEMS = Reasons(EMPTY_ITEM, UNKNOWN_LABEL, DUPLICATE_ITEM)
QUERIES = Reasons(EMPTY_QUERY, UNKNOWN_GOLD, None)


def usable(
    rows: pl.DataFrame, task: LampTask, labels: Collection[str], reasons: Reasons
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Return the usable rows, and how many are not by reason.

    rows: columns user, id, text, answer. labels: the answers that there are; empty for free text.
    """
    if labels:
        told = rows["answer"].unique()
        known = pl.Series([_label(answer, task) for answer in told], dtype=pl.String)
        rows = rows.with_columns(pl.col("answer").replace_strict(told, known))
    blank = pl.col("text", "answer").str.strip_chars(WHITE_SPACE) == ""
    unknown = ~pl.col("answer").is_in(list(labels)) if labels else pl.lit(False)
    again = ~pl.struct("user", "text", "answer").is_first_distinct()
    reason = (
        pl.when(pl.any_horizontal(blank))
        .then(pl.lit(reasons.empty))
        .when(unknown)
        .then(pl.lit(reasons.unknown))
        .when(again if reasons.twice else pl.lit(False))
        .then(pl.lit(reasons.twice))
    )
    marked = rows.with_columns(reason.alias("reason"))
    counts = marked["reason"].drop_nulls().value_counts()
    kept = marked.filter(pl.col("reason").is_null()).drop("reason")
    return kept, dict(counts.iter_rows())


def _label(answer: str, task: LampTask) -> str:
    """A label stripped, as LaMP scores it, and a rating "4.0" as "4"."""
    if task.kind == "rating":
        with suppress(ValueError):
            rating = float(answer)
            return str(int(rating)) if rating.is_integer() else answer.strip()
    return answer.strip()

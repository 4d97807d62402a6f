"""Which of the users' items and queries are kept. The others are dropped and counted by reason."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

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


def usable(
    rows: pl.DataFrame,
    task: LampTask,
    labels: Collection[str],
    empty: str,
    unknown: str,
    twice: str | None = None,
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Return the usable rows, and how many are not by reason.

    rows: columns user, id, text, answer. labels: the answers that there are; empty for free text.
    empty, unknown, twice: the reasons; without the last, rows may stand twice.
    """
    answer = pl.col("answer")
    if labels:
        told = rows["answer"].unique()
        known = pl.Series([_label(one, task) for one in told], dtype=pl.String)
        rows = rows.with_columns(answer.replace_strict(told, known))
    blank = pl.any_horizontal(pl.col("text", "answer").str.strip_chars(WHITE_SPACE) == "")
    faults = [(blank, empty)]
    if labels:
        faults.append((~answer.is_in(list(labels)), unknown))
    if twice:
        faults.append((~pl.struct("user", "text", "answer").is_first_distinct(), twice))
    reason = pl.coalesce(*(pl.when(fault).then(pl.lit(name)) for fault, name in faults))
    marked = rows.with_columns(reason.alias("reason"))
    counts = marked["reason"].drop_nulls().value_counts()
    return marked.filter(pl.col("reason").is_null()).drop("reason"), dict(counts.iter_rows())


def _label(answer: str, task: LampTask) -> str:
    """A label stripped, as LaMP scores it, and a rating "4.0" as "4"."""
    if answer in task.labels:
        return answer
    if task.kind == "rating":
        with suppress(ValueError):
            rating = float(answer)
            return str(int(rating)) if rating.is_integer() else answer.strip()
    return answer.strip()

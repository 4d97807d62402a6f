"""Which of the users' items and queries are kept. The others are dropped and counted by reason."""

from collections import Counter
from contextlib import suppress

import numpy as np
import polars as pl

from tasks.lamp.citations import UNASKED
from tasks.lamp.content import WHITE_SPACE
from tasks.lamp.definitions import LampTask
from tasks.lamp.tables import lists

EMPTY_ITEM = "profile item with empty text or answer"
DUPLICATE_ITEM = "profile item that stands twice in one profile"
UNKNOWN_LABEL = "profile item with a label outside the task's set"
NO_NEGATIVE = "paper without another one of another citation to ask it against"
EMPTY_QUERY = "query with empty input or gold"
UNKNOWN_GOLD = "query with a gold outside the task's set"
EMPTY_USER = "user with no profile items left"
ORPHAN_QUERY = "query of a user with no profile items left"


def usable(users: pl.DataFrame, task: LampTask) -> tuple[pl.DataFrame, Counter[str]]:
    """Return the users with their usable items and queries, and how many are not, by reason.

    users: columns as `tables.USERS`. Labels are written as the task has them.
    """
    users, dropped = _column(users, task, "profile", "text", "answer", EMPTY_ITEM, UNKNOWN_LABEL)
    users, queries = _column(users, task, "query", "input", "gold", EMPTY_QUERY, UNKNOWN_GOLD)
    left = users["profile"].list.len() > 0
    orphans = int(users["query"].list.len().filter(~left).sum())
    users_lost = {EMPTY_USER: int((~left).sum()), ORPHAN_QUERY: orphans}
    return users.filter(left), dropped + queries + Counter(users_lost)


def _column(
    users: pl.DataFrame, task: LampTask, column: str, *names: str
) -> tuple[pl.DataFrame, Counter[str]]:
    """names: of the fields text and answer; then the reasons, empty and unknown."""
    text, answer = (pl.col(name) for name in names[:2])
    rows = users.select(column).with_row_index("user")
    rows = rows.explode(column, empty_as_null=False).unnest(column)
    blank = pl.any_horizontal(pl.col(names[:2]).str.strip_chars(WHITE_SPACE) == "")
    faults = {names[2]: blank}
    if task.labels:
        as_written = rows[names[1]].unique()
        labels = pl.Series([_label(one, task) for one in as_written], dtype=pl.String)
        rows = rows.with_columns(answer.replace_strict(as_written, labels))
        unasked = [UNASKED] if column == "profile" and task.items == "built" else []
        faults[names[3]] = ~answer.is_in([*task.labels, *unasked])
    if column == "profile":
        faults[DUPLICATE_ITEM] = ~pl.struct("user", text, answer).is_first_distinct()
    reason = pl.coalesce(*(pl.when(fault).then(pl.lit(name)) for name, fault in faults.items()))
    rows = rows.with_columns(reason.alias("reason"))
    kept = rows.filter(pl.col("reason").is_null())
    lengths = np.bincount(kept["user"], minlength=users.height)
    values = lists(lengths, kept.select("id", text, answer).to_struct())
    users = users.with_columns(pl.Series(column, pl.from_arrow(values)))
    return users, Counter(rows["reason"].drop_nulls())


def _label(answer: str, task: LampTask) -> str:
    """A label stripped, as LaMP scores it, and a rating "4.0" as "4"."""
    if answer not in task.labels and task.kind == "rating":
        with suppress(ValueError):
            rating = float(answer)
            answer = str(int(rating)) if rating.is_integer() else answer
    return answer if answer in task.labels else answer.strip()

"""Development users: settings are chosen on these, so that few-shot users are scored once.

They are anchor candidates, who are nobody's anchor then. What is chosen on them has not seen a
few-shot user.
"""

from __future__ import annotations

import polars as pl

from tasks.errors import InputError
from tasks.lamp.definitions import LampTask
from tasks.lamp.splits import rank
from tasks.lamp.tables import SIDE

# A development user's last items are asked: a third of all, and no more than so many.
QUERIES = 5
# So many items before them are the user's profile.
ITEMS = 10


def split_off(
    candidates: pl.DataFrame, task: LampTask, instruction: str, seed: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(the anchor candidates left, the development users), columns as `tables.SIDE`.

    Half of the candidates with three items or more, drawn by the seed. instruction: what stands
    before a query's text. Raises InputError where items are no questions, or nobody is left.
    """
    if task.items == "completed":
        raise InputError(f"split.development: items of {task.name} are no questions to be asked")
    able = candidates.filter(pl.col("profile").list.len() >= 3)
    order = sorted(able["user_id"], key=lambda name: rank(seed, name))
    drawn = pl.col("user_id").is_in(order[: len(order) // 2])
    left = candidates.filter(~drawn)
    if left.is_empty() or len(order) < 2:
        raise InputError(
            f"split.development: {candidates.height} anchor candidates are too few to divide; give "
            "two or more with three items each"
        )
    count = (pl.col("profile").list.len() // 3).clip(upper_bound=QUERIES)
    item = pl.element().struct
    asked = (
        pl.col("profile")
        .list.tail(count)
        .list.eval(
            pl.struct(
                id=item.field("id"),
                input=pl.lit(instruction) + item.field("text"),
                gold=item.field("answer"),
            )
        )
    )
    before = pl.col("profile").list.head(pl.col("profile").list.len() - count).list.tail(ITEMS)
    users = able.filter(drawn).with_columns(profile=before, query=asked)
    return left, users.select(SIDE.names)

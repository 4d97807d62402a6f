"""The published split: by user, whoever the author is.

OPPU tests on 100 users and adapts the base model on the others. Per-Pcs divides the others into
users for the base model and anchor candidates (and a tenth that its experiments do not use, which
is not made here). MTA's few-shot users have profiles of exactly 10 items. How the others are
divided is not published: here by the seed, in the configured shares.

Windows over one author are on several sides here, as in the published scores. So
tasks/lamp/groups.py is the default; the audit counts such users.
"""

from __future__ import annotations

import polars as pl

from tasks.errors import InputError
from tasks.lamp.audit import shared_groups
from tasks.lamp.definitions import LampTask
from tasks.lamp.groups import COLUMNS, SIDES, Split, rank, side_counts, with_groups

FEW_SHOT_ITEMS = 10


def published_split(
    users: pl.DataFrame,
    task: LampTask,
    *,
    seed: int,
    base_share: float,
    anchor_share: float,
    share: float,
    few_shot_users: int,
    few_shot_items: int | None,
) -> Split:
    """Divide users (columns as from `formats.read_users`) into base, anchor and few-shot.

    With roles (the user files of Per-Pcs and MTA): they are kept. Without: see `_assign`; few-shot
    users keep their last `few_shot_items` items (None: FEW_SHOT_ITEMS), as profiles go from old to
    new where they have an order.
    share: as in `groups.find_groups`; groups are only counted.

    Returns tables as `groups.split_users` does, but with every user's own id and nobody pooled or
    removed. counts has the same keys, and unseen_few_shot_items and shared_author (users that
    `audit.shared_groups` counts).
    Raises InputError when a side is empty, or only some users have a role.
    """
    table, given = with_groups(users, share, task)
    most = few_shot_items or FEW_SHOT_ITEMS
    if not given:
        roles = _assign(table, seed, base_share, anchor_share, few_shot_users, most)
        table = table.with_columns(role=pl.Series(roles, dtype=pl.String))
    base, anchor, few_shot = (
        table.filter(pl.col("role") == side).select(COLUMNS).sort("user_id", maintain_order=True)
        for side in SIDES
    )
    asked = few_shot.filter(pl.col("query").list.len() > 0)
    unseen = 0
    if not given:
        unseen = int(asked["profile"].list.len().sum()) - most * asked.height
        asked = asked.with_columns(pl.col("profile").list.tail(most))
    for side, frame in (("anchor", anchor), ("few-shot", asked)):
        if frame.is_empty():
            raise InputError(
                f"{task.name}: no {side} user is left of {table.height} users; give more users, "
                "or change split.few_shot_users, split.base_share and split.anchor_share"
            )
    counts = side_counts(table, base, anchor, asked, task) | {
        "removed_shared_group": 0,
        "pooled_users": 0,
        "unseen_few_shot_items": unseen,
        "shared_author": sum(shared_groups(table).values()),
    }
    return Split(base, anchor, asked, table, counts)


def _assign(
    table: pl.DataFrame,
    seed: int,
    base_share: float,
    anchor_share: float,
    few_shot_users: int,
    items: int,
) -> list[str]:
    """The side of each user, in the order of `table`.

    Few-shot: the `few_shot_users` with the shortest profiles among the users with a query and at
    least `items` items; never more than the share of all users that base_share and anchor_share
    leave. The others are base users and anchor candidates in the proportion of the two shares. Ties
    and order by `groups.rank`.
    """
    lengths = table["profile"].list.len().to_list()
    asks = (table["query"].list.len() > 0).to_list()
    ids = table["user_id"].to_list()
    order = sorted(range(table.height), key=lambda row: rank(seed, ids[row]))
    able = [row for row in order if asks[row] and lengths[row] >= items]
    if not able:
        raise InputError(
            f"split.kind published: no user with a query has {items} items, the longest of "
            f"{table.height} has {max(lengths, default=0)}; lower split.few_shot_items"
        )
    room = max(1, round((1 - base_share - anchor_share) * table.height))
    able.sort(key=lambda row: lengths[row])
    chosen = set(able[: min(few_shot_users, room)])
    rest = [row for row in order if row not in chosen]
    bases = round(len(rest) * base_share / (base_share + anchor_share))
    sides = dict.fromkeys(rest[:bases], "base") | dict.fromkeys(rest[bases:], "anchor")
    return [sides.get(row, "few_shot") for row in range(table.height)]

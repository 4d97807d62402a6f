"""The published split: users as they come, whoever their author is.

OPPU tests on 100 users and adapts the base model on the others; Per-Pcs divides the others into
users for the base model and anchor candidates (and a tenth that its experiments leave aside, which
is not made here). MTA's few-shot users are those whose profile has exactly 10 items. What is not
published is how the others are divided: here by the seed, in the shares of the configuration.

Windows over one author stand on several sides here. That is what published scores are made of, and
why tasks/lamp/groups.py is the default; the audit counts it.
"""

from __future__ import annotations

import hashlib

import polars as pl

from tasks.errors import InputError
from tasks.lamp.audit import query_places
from tasks.lamp.definitions import LampTask
from tasks.lamp.groups import SIDES, Split, find_groups

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

    With roles (the user files of Per-Pcs and MTA): as they are. Without: see `_assign`; the
    few-shot users keep their last `few_shot_items` items (FEW_SHOT_ITEMS where it is None), since
    profiles go from old to new where they have an order, the rest stays unseen.
    share: as in `groups.find_groups`; groups are found to be counted, not to be kept together.

    Returns tables as `groups.split_users` does, but with every user's own id and nobody pooled or
    removed; counts has the same keys, and unseen_few_shot_items and shared_author (base or anchor
    users of an author with a few-shot user, base users of one with an anchor candidate).
    Raises InputError when a side is empty, or only some users have a role.
    """
    table = users.with_columns(find_groups(users, share, task))
    without = table["role"].null_count()
    if 0 < without < table.height:
        raise InputError(
            f"{without} of {table.height} users have no role; give all of them one, or none"
        )
    most = few_shot_items or FEW_SHOT_ITEMS
    if without:
        roles = _assign(table, seed, base_share, anchor_share, few_shot_users, most)
        table = table.with_columns(role=pl.Series(roles, dtype=pl.String))
    sides = {
        side: table.filter(pl.col("role") == side)
        .select("user_id", "group", "profile", "query")
        .sort("user_id", maintain_order=True)
        for side in SIDES
    }
    asked = sides["few_shot"].filter(pl.col("query").list.len() > 0)
    unseen = 0
    if without:
        unseen = int(asked["profile"].list.len().sum()) - most * asked.height
        asked = asked.with_columns(pl.col("profile").list.tail(most))
    for side, frame in (("anchor", sides["anchor"]), ("few-shot", asked)):
        if frame.is_empty():
            raise InputError(
                f"{task.name}: no {side} user is left of {table.height} users; give more users, "
                "or change split.few_shot_users, split.base_share and split.anchor_share"
            )
    trained_on = pl.concat([sides["base"], sides["anchor"]])
    places = query_places(asked, asked, task)
    shared = pl.concat([sides["anchor"], sides["few_shot"]])
    counts = {
        "users": table.height,
        "users_with_query": int((table["query"].list.len() > 0).sum()),
        "groups": table["group"].n_unique(),
        "removed_shared_group": 0,
        "removed_few_shot_without_query": sides["few_shot"].height - asked.height,
        "base_users": sides["base"].height,
        "anchor_candidates": sides["anchor"].height,
        "few_shot_users": asked.height,
        "few_shot_groups": asked["group"].n_unique(),
        "pooled_users": 0,
        "queries": int(asked["query"].list.len().sum()),
        "queries_in_other_profiles": query_places(asked, trained_on, task)["any"],
        "queries_in_few_shot_profiles": places["any"],
        "queries_in_own_profile": places["own"],
        "unseen_few_shot_items": unseen,
        "shared_author": sides["anchor"].join(sides["few_shot"], on="group", how="semi").height
        + sides["base"].join(shared, on="group", how="semi").height,
    }
    return Split(sides["base"], sides["anchor"], asked, table, counts)


def _assign(
    table: pl.DataFrame,
    seed: int,
    base_share: float,
    anchor_share: float,
    few_shot_users: int,
    items: int,
) -> list[str]:
    """The side of each user, in the order of `table`.

    Few-shot: of the users with a query and at least `items` items the `few_shot_users` that have
    fewest above it, so those with exactly as many first; never more than the share of all users
    that base_share and anchor_share leave. The others are base users and anchor candidates in the
    proportion of the two shares. Ties and order by a hash of the seed and the user's id.
    """
    lengths = table["profile"].list.len().to_list()
    asks = (table["query"].list.len() > 0).to_list()
    ids = table["user_id"].to_list()
    order = sorted(range(table.height), key=lambda row: _rank(seed, ids[row]))
    able = [row for row in order if asks[row] and lengths[row] >= items]
    if not able:
        raise InputError(
            f"split.kind published: no user with a query has {items} items, the longest of "
            f"{table.height} has {max(lengths)}; lower split.few_shot_items"
        )
    room = max(1, round((1 - base_share - anchor_share) * table.height))
    able.sort(key=lambda row: lengths[row])
    chosen = set(able[: min(few_shot_users, room)])
    rest = [row for row in order if row not in chosen]
    bases = round(len(rest) * base_share / (base_share + anchor_share))
    sides = dict.fromkeys(rest[:bases], "base") | dict.fromkeys(rest[bases:], "anchor")
    return [sides.get(row, "few_shot") for row in range(table.height)]


def _rank(seed: int, user_id: str) -> tuple[bytes, str]:
    return hashlib.sha256(f"{seed}:{user_id}".encode()).digest(), user_id

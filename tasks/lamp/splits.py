"""On which side of the experiment each user is.

grouped     A group of users that share content (tasks/lamp/groups.py) is on one side only, and a
            base or anchor author's windows are pooled into one user.
published   By user, whoever the author is. OPPU tests on 100 users and adapts the base model on the
            others. Per-Pcs divides the others into users for the base model and anchor candidates
            (and a tenth that its experiments do not use, which is not made here). MTA's few-shot
            users have profiles of exactly 10 items. How the others are divided is not published:
            here by the seed, in the configured shares. Windows over one author are on several
            sides here, as in the published scores; the audit counts such users.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from tasks.errors import InputError
from tasks.lamp.audit import query_places, shared_groups
from tasks.lamp.content import about_and_answer
from tasks.lamp.definitions import LampTask
from tasks.lamp.folders import ROLES
from tasks.lamp.groups import find_groups
from tasks.lamp.options import SplitOptions
from tasks.lamp.tables import SIDE

# Of the published split, where the configuration does not say.
FEW_SHOT_ITEMS, FEW_SHOT_USERS = 10, 100


@dataclass(frozen=True)
class Split:
    """The three sides, each with columns user_id, group, profile, query, sorted by user_id.

    grouped: base and anchor have one row per author, user_id = group, distinct items and queries in
        the order first seen; few_shot the users as they came.
    published: the users as they came; where the data give no roles, few-shot users with their last
        `few_shot_items` items alone, as profiles go from old to new where they have an order.
    users: all users as they came, with their group and their side (role). counts: as `counted`;
        removed_shared_group (users), pooled_users (merged into another user of their author),
        unseen_few_shot_items, and published shared_author (users of `audit.shared_groups`).
    """

    base: pl.DataFrame
    anchor: pl.DataFrame
    few_shot: pl.DataFrame
    users: pl.DataFrame
    counts: dict[str, int]


def shown_items(options: SplitOptions) -> slice:
    """Which items of a few-shot user's profile a run shows, where the data give no roles."""
    if options.kind == "published":
        return slice(-(options.few_shot_items or FEW_SHOT_ITEMS), None)
    return slice(options.few_shot_items)


def split_users(users: pl.DataFrame, task: LampTask, options: SplitOptions, seed: int) -> Split:
    """Divide users (columns as from `formats.read_users` or `content.keyed`) into three sides.

    Roles that the data give are kept. Raises InputError for a side that is needed and empty, and,
    grouped, for an author on two sides; by `allow_shared_groups` the earlier side loses such users.
    """
    table = users.with_columns(find_groups(users, options.same_author_share, task))
    has_roles = table["role"].null_count() < table.height
    grouped = options.kind == "grouped"
    if not has_roles:
        divide = _grouped_roles if grouped else _published_roles
        roles = divide(table, options, seed)
        table = table.with_columns(role=pl.Series(roles, dtype=pl.String))
    shared = sum(shared_groups(table).values())
    if has_roles and grouped and shared and not options.allow_shared_groups:
        raise InputError(_two_sides(table, options.same_author_share))
    base, anchor, few_shot = (
        table.filter(pl.col("role") == side).select(SIDE.names).sort("user_id", maintain_order=True)
        for side in ROLES
    )
    needs_base = grouped and options.base_share > 0 and not (has_roles and base.is_empty())
    pooled = unseen = left_out = 0
    if grouped:
        # Few-shot authors are kept off the other sides even if no query of theirs is left.
        anchor = anchor.join(few_shot, on="group", how="anti")
        base = base.join(few_shot, on="group", how="anti").join(anchor, on="group", how="anti")
        before = base.height + anchor.height
        base, anchor = _pool(base, task), _pool(anchor, task)
        pooled = before - base.height - anchor.height
    asked = few_shot.filter(pl.col("query").list.len() > 0)
    if not grouped and not has_roles:
        most = options.few_shot_items or FEW_SHOT_ITEMS
        unseen = int(asked["profile"].list.len().sum()) - most * asked.height
        asked = asked.with_columns(pl.col("profile").list.tail(most))
    if options.few_shot_users:
        order = sorted(asked["user_id"], key=lambda name: rank(seed, name))
        asked = asked.filter(pl.col("user_id").is_in(order[: options.few_shot_users]))
        left_out = len(order) - asked.height
    sides = {"base": base, "anchor": anchor, "few_shot": asked}
    counts = counted(table, sides, task) | {
        "few_shot_users_left_out": left_out,
        "removed_shared_group": shared if grouped else 0,
        "pooled_users": pooled,
        "unseen_few_shot_items": unseen,
    }
    if not grouped:
        counts["shared_author"] = shared
    for side in ("anchor", "few_shot", *(["base"] if needs_base else [])):
        if sides[side].is_empty():
            raise InputError(_empty_side(side, has_roles, counts))
    return Split(**sides, users=table, counts=counts)


def counted(
    table: pl.DataFrame, sides: Mapping[str, pl.DataFrame], task: LampTask
) -> dict[str, int]:
    """Counts of all users, `table`, and of the sides made of them.

    groups are authors. queries: of the few-shot users; queries_in_*: those whose text stands in a
    base or anchor (other), any few-shot, or the user's own profile.
    """
    base, anchor, few_shot = (sides[side] for side in ROLES)
    places = query_places(few_shot, few_shot, task)
    asks = table["query"].list.len() > 0
    return {
        "users": table.height,
        "users_with_query": int(asks.sum()),
        "groups": table["group"].n_unique(),
        "removed_few_shot_without_query": int((~asks & (table["role"] == "few_shot")).sum()),
        "base_users": base.height,
        "anchor_candidates": anchor.height,
        "few_shot_users": few_shot.height,
        "few_shot_groups": few_shot["group"].n_unique(),
        "queries": int(few_shot["query"].list.len().sum()),
        "queries_in_other_profiles": query_places(few_shot, pl.concat([base, anchor]), task)["any"],
        "queries_in_few_shot_profiles": places["any"],
        "queries_in_own_profile": places["own"],
    }


def _grouped_roles(table: pl.DataFrame, options: SplitOptions, seed: int) -> list[str]:
    """The side of each user: whole groups, in the order of `rank`, which no profile can change.

    `base_share` and `anchor_share` of all groups, and the rest few-shot; groups without a query go
    to base and anchor.
    """
    asked = table.group_by("group").agg(asks=(pl.col("query").list.len() > 0).any())
    groups = sorted(asked.iter_rows(), key=lambda row: rank(seed, row[0]))
    share, anchor_share = options.base_share, options.anchor_share
    bases = max(1, round(share * len(groups))) if share > 0 else 0
    anchors = max(1, round(anchor_share * len(groups)))
    wanted = max(0, len(groups) - bases - anchors)
    few_shot = dict.fromkeys([group for group, asks in groups if asks][:wanted], "few_shot")
    rest = [group for group, _ in groups if group not in few_shot]
    if len(rest) > bases + anchors:
        bases = max(bases, math.floor(len(rest) * share / (share + anchor_share)))
    sides = few_shot | dict.fromkeys(rest[:bases], "base") | dict.fromkeys(rest[bases:], "anchor")
    return [sides[group] for group in table["group"]]


def _published_roles(table: pl.DataFrame, options: SplitOptions, seed: int) -> list[str]:
    """The side of each user.

    Few-shot: the shortest profiles among users with a query and `few_shot_items` items, at most
    `few_shot_users` and the share of all users that the other two leave. Base and anchor divide the
    rest in the proportion of their shares. Ties and order by `rank`.
    """
    items = options.few_shot_items or FEW_SHOT_ITEMS
    share, anchor_share = options.base_share, options.anchor_share
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
    room = max(1, round((1 - share - anchor_share) * table.height))
    able.sort(key=lambda row: lengths[row])
    chosen = set(able[: min(options.few_shot_users or FEW_SHOT_USERS, room)])
    rest = [row for row in order if row not in chosen]
    bases = round(len(rest) * share / (share + anchor_share))
    sides = dict.fromkeys(rest[:bases], "base") | dict.fromkeys(rest[bases:], "anchor")
    return [sides.get(row, "few_shot") for row in range(table.height)]


def rank(seed: int, name: str) -> tuple[bytes, str]:
    """A sort key: a random order that depends on the seed and the name alone."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest(), name


def _pool(users: pl.DataFrame, task: LampTask) -> pl.DataFrame:
    """One row per group; the first of equal items and queries stays, in the order of user ids."""
    members = users.sort("user_id", maintain_order=True)
    pooled = members.select("group", user_id="group").unique().sort("group")
    for column in ("profile", "query"):
        flat = members.select("group", column).explode(column).drop_nulls(column)
        flat = flat.with_columns(**about_and_answer(column, task))
        distinct = flat.unique(["group", "about", "answer"], keep="first", maintain_order=True)
        rows = distinct.group_by("group", maintain_order=True).agg(column)
        none = pl.lit([], dtype=users.schema[column])
        pooled = pooled.join(rows, on="group", how="left").with_columns(
            pl.col(column).fill_null(none)
        )
    return pooled.select(SIDE.names)


def _two_sides(users: pl.DataFrame, share: float) -> str:
    """The error line for roles that put an author on two sides, with the worst pair shown."""
    first = users.select("group", pl.col("role").cast(pl.Enum(ROLES)), "user_id").sort("user_id")
    first = first.unique(["group", "role"], keep="first", maintain_order=True)
    pairs = first.join(first, on="group", suffix="_other")
    pairs = pairs.filter(pl.col("role") < pl.col("role_other"))
    # Scored users first: what they share is in the scores.
    by = ["role_other", "role", "user_id"]
    pair = pairs.sort(by, descending=[True, True, False]).row(0, named=True)
    return (
        f"{sum(shared_groups(users).values())} base or anchor users are of one author with a user "
        f"of another side, for example {pair['role']} user {pair['user_id']!r} with "
        f"{pair['role_other']} user {pair['user_id_other']!r} (split.same_author_share {share}): "
        "take them out of the data, or set split.allow_shared_groups=true to have them left out "
        "and counted"
    )


def _empty_side(side: str, has_roles: bool, counts: dict[str, int]) -> str:
    if side == "few_shot" and not has_roles and not counts["users_with_query"]:
        return f"none of {counts['users']} users has a query to be scored on; add queries"
    name = {"base": "base", "anchor": "anchor candidate", "few_shot": "few-shot"}[side]
    hint = "give more users, or change the shares and sizes of `split`"
    if has_roles:
        hint = f"add {name} users by other authors"
    return (
        f"no {name} user is left of {counts['users']} users by {counts['groups']} authors "
        f"({counts['removed_shared_group']} removed because their author stands on another side, "
        f"{counts['removed_few_shot_without_query']} few-shot users have no query); {hint}"
    )

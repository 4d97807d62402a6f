"""Which users are one author, and on which side of the experiment each author is.

LaMP's "users" can be sliding windows over one author's items; then a test user's query stands in a
neighbour's profile. So users that share content form a group, a group is on one side only, and a
base or anchor author's windows are pooled into one user.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import polars as pl

from tasks.errors import InputError
from tasks.lamp.audit import query_places, shared_groups
from tasks.lamp.content import told
from tasks.lamp.definitions import LampTask

SIDES = ("base", "anchor", "few_shot")
COLUMNS = ("user_id", "group", "profile", "query")
# They bound the search for shared content (`_sharing_pairs`); neither changes what it finds.
PREFIX_MATCHES = 4
JOINED_ROWS = 5_000_000


@dataclass(frozen=True)
class Split:
    """The three sides, each with columns user_id, group, profile, query, sorted by user_id.

    base and anchor: one row per author, user_id = group, distinct items and queries in the order
    first seen. few_shot: the users as they came. users: all users as they came, with their group
    and their side (role). counts: see `split_users`.
    """

    base: pl.DataFrame
    anchor: pl.DataFrame
    few_shot: pl.DataFrame
    users: pl.DataFrame
    counts: dict[str, int]


def find_groups(users: pl.DataFrame, share: float, task: LampTask | None = None) -> pl.Series:
    """Group ids (string, one per row of `users`): the smallest user_id, as text, of the group.

    Two users are one group when they share at least `share` (0..1] of the distinct (text, answer)
    pairs of the smaller profile, or have the same user_id; and so on through third users. Texts are
    one if they are about the same (`content.told`); task: None takes the whole text.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components  # not above: scipy takes long

    items = (
        users.select(pl.int_range(pl.len()).alias("row"), "profile")
        .explode("profile")
        .drop_nulls("profile")
    )
    # Numbers for texts and answers, so that what follows is light; ordered as they are.
    content = told(pl.col("profile"), "profile", task)
    numbers = {name: text.rank("dense") for name, text in content.items()}
    items = items.select("row", **numbers).unique()
    # An exact integer per pair instead of its hash: joins are as fast and nothing can collide.
    pairs = items.group_by("about", "answer").agg(users=pl.len()).sort("about", "answer")
    items = items.join(pairs.with_row_index("pair"), on=["about", "answer"]).select(
        "row", "pair", "users", size=pl.len().over("row"), order=_rarity_order()
    )
    shared = _sharing_pairs(items, share)
    ids = users.select("user_id").with_row_index("row")
    first = ids.select(row_other=pl.first("row").over("user_id"))
    left = np.concatenate([shared["row"], ids["row"]])
    right = np.concatenate([shared["row_other"], first["row_other"]])
    edges = coo_array((np.ones(len(left)), (left, right)), (ids.height, ids.height))
    _, components = connected_components(edges, directed=False)
    ids = ids.with_columns(component=pl.Series(components))
    return ids.select(group=pl.col("user_id").min().over("component"))["group"]


def _sharing_pairs(items: pl.DataFrame, share: float) -> pl.DataFrame:
    """Rows `row`, `row_other` of users who share at least `share` of the smaller profile.

    items: row, pair, users (who have this pair), size (of the profile), order (0 = rarest).
    """
    # If a profile of n items shares t of them with another one, any n - t + c of its items hold
    # at least c of those. So only its n - t + c rarest items look for partners with c matches,
    # and an item that everybody has does not pair everybody with everybody.
    wanted = (pl.col("size") * share - 1e-9).ceil().clip(lower_bound=1)
    matches = wanted.clip(upper_bound=PREFIX_MATCHES)
    rare = items.filter(pl.col("order") < pl.col("size") - wanted + matches)
    # Joined in batches of whole users, so that memory stays bounded however much is shared.
    rare = rare.sort("row").with_columns(
        batch=(pl.col("users").cum_sum() // JOINED_ROWS).min().over("row")
    )
    smaller = (pl.col("size") < pl.col("size_other")) | (
        (pl.col("size") == pl.col("size_other")) & (pl.col("row") < pl.col("row_other"))
    )
    found = []
    for batch in rare.partition_by("batch"):
        candidates = (
            batch.join(items, on="pair", suffix="_other")
            .filter(smaller)
            .group_by("row", "row_other", "size")
            .agg(matched=pl.len())
            .filter(pl.col("matched") >= matches)
        )
        found.append(
            candidates.join(items.select("row", "pair"), on="row")
            .join(items.select(row_other="row", pair="pair"), on=["row_other", "pair"])
            .group_by("row", "row_other", "size")
            .agg(shared=pl.len())
            .filter(pl.col("shared") >= wanted)
            .select("row", "row_other")
        )
    return pl.concat(found) if found else items.select("row", row_other="row").clear()


def split_users(
    users: pl.DataFrame,
    task: LampTask,
    *,
    seed: int,
    base_share: float,
    anchor_share: float,
    share: float,
    allow_shared_groups: bool = False,
) -> Split:
    """Divide users (columns as from `formats.read_users` or `content.keyed`) into three sides.

    With roles: they are kept. A base or anchor user whose author also has a few-shot user, or a
    base user whose author also has an anchor candidate, is an error; with `allow_shared_groups`
    such users are removed and counted.
    Without: whole groups are assigned, `base_share` and `anchor_share` of all groups and the rest
    few-shot, in the order of `rank`; groups without a query go to base and anchor.
    share: as in `find_groups`.

    counts: those of `side_counts`; removed_shared_group (users); pooled_users (users merged into
    another user of their author).
    Raises InputError for a side that is asked for and empty, roles that only some users have, and
    roles that put an author on two sides.
    """
    table, given = with_groups(users, share, task)
    if given:
        _check_roles(table, share, allow_shared_groups)
    else:
        sides = _assign(table, seed, base_share, anchor_share)
        roles = [sides[group] for group in table["group"]]
        table = table.with_columns(role=pl.Series(roles, dtype=pl.String))
    bases, anchors, few_shot = (table.filter(pl.col("role") == side) for side in SIDES)
    # Authors of few-shot users are kept off the other sides even if no query of theirs is left.
    own_anchors = anchors.join(few_shot, on="group", how="anti")
    own_bases = bases.join(few_shot, on="group", how="anti").join(
        own_anchors, on="group", how="anti"
    )
    base, anchor = _pool(own_bases, task), _pool(own_anchors, task)
    asked = few_shot.filter(pl.col("query").list.len() > 0).select(COLUMNS).sort("user_id")
    counts = side_counts(table, base, anchor, asked, task) | {
        "removed_shared_group": sum(shared_groups(table).values()),
        "pooled_users": own_bases.height + own_anchors.height - base.height - anchor.height,
    }
    needed = {"anchor": anchor, "few_shot": asked}
    if base_share > 0 and not (given and bases.is_empty()):
        needed["base"] = base
    for side, frame in needed.items():
        if frame.is_empty():
            raise InputError(_empty_side(side, given, counts))
    return Split(base, anchor, asked, table, counts)


def with_groups(users: pl.DataFrame, share: float, task: LampTask) -> tuple[pl.DataFrame, bool]:
    """`users` with a column group (`find_groups`), and whether the data give their roles.

    Raises InputError when only some of the users have a role.
    """
    table = users.with_columns(find_groups(users, share, task))
    without = table["role"].null_count()
    if 0 < without < table.height:
        raise InputError(
            f"{without} of {table.height} users have no role; give all of them one, or none"
        )
    return table, without < table.height


def side_counts(
    table: pl.DataFrame,
    base: pl.DataFrame,
    anchor: pl.DataFrame,
    few_shot: pl.DataFrame,
    task: LampTask,
) -> dict[str, int]:
    """The counts that both kinds of split have. table: all users; the others: the sides made.

    groups are authors. queries: of the few-shot users; queries_in_*: those whose text stands in a
    base or anchor (other), any few-shot, or the user's own profile.
    """
    places = query_places(few_shot, few_shot, task)
    asking = table.filter(pl.col("query").list.len() > 0)
    return {
        "users": table.height,
        "users_with_query": asking.height,
        "groups": table["group"].n_unique(),
        "removed_few_shot_without_query": int((table["role"] == "few_shot").sum())
        - few_shot.height,
        "base_users": base.height,
        "anchor_candidates": anchor.height,
        "few_shot_users": few_shot.height,
        "few_shot_groups": few_shot["group"].n_unique(),
        "queries": int(few_shot["query"].list.len().sum()),
        "queries_in_other_profiles": query_places(few_shot, pl.concat([base, anchor]), task)["any"],
        "queries_in_few_shot_profiles": places["any"],
        "queries_in_own_profile": places["own"],
    }


def _check_roles(table: pl.DataFrame, share: float, allow_shared_groups: bool) -> None:
    """Raise InputError for a role that does not exist, or an author on two sides."""
    unknown = table.filter(~pl.col("role").is_in(SIDES))
    if unknown.height:
        raise InputError(f"role {unknown['role'][0]!r}: use one of {', '.join(SIDES)}")
    if any(shared_groups(table).values()) and not allow_shared_groups:
        raise InputError(_two_sides(table, share))


def _assign(
    table: pl.DataFrame, seed: int, base_share: float, anchor_share: float
) -> dict[str, str]:
    """Group id -> side. The order is a hash per group: no profile can move anybody."""
    asked = table.group_by("group").agg(asks=(pl.col("query").list.len() > 0).any())
    groups = sorted(asked.iter_rows(), key=lambda row: rank(seed, row[0]))
    bases = max(1, round(base_share * len(groups))) if base_share > 0 else 0
    anchors = max(1, round(anchor_share * len(groups)))
    wanted = max(0, len(groups) - bases - anchors)
    few_shot = dict.fromkeys([group for group, asks in groups if asks][:wanted], "few_shot")
    rest = [group for group, _ in groups if group not in few_shot]
    if len(rest) > bases + anchors:
        bases = max(bases, math.floor(len(rest) * base_share / (base_share + anchor_share)))
    return few_shot | dict.fromkeys(rest[:bases], "base") | dict.fromkeys(rest[bases:], "anchor")


def rank(seed: int, name: str) -> tuple[bytes, str]:
    """A sort key: a random order that depends on the seed and the name alone."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest(), name


def _pool(users: pl.DataFrame, task: LampTask) -> pl.DataFrame:
    """One row per group; the first of equal items and queries stays, in the order of user ids."""
    members = users.sort("user_id", maintain_order=True)
    pooled = members.select("group").unique().sort("group")
    for column in ("profile", "query"):
        flat = members.select("group", column).explode(column).drop_nulls(column)
        flat = flat.with_columns(**told(pl.col(column), column, task))
        distinct = flat.unique(["group", "about", "answer"], keep="first", maintain_order=True)
        rows = distinct.group_by("group", maintain_order=True).agg(column)
        none = pl.lit([], dtype=users.schema[column])
        pooled = pooled.join(rows, on="group", how="left").with_columns(
            pl.col(column).fill_null(none)
        )
    return pooled.select(pl.col("group").alias("user_id"), "group", "profile", "query")


def _rarity_order() -> pl.Expr:
    """0 for the rarest item of a row's profile, and so on; ties by the pair's number."""
    return pl.struct("users", "pair").rank("ordinal").over("row").cast(pl.Int64) - 1


def _two_sides(users: pl.DataFrame, share: float) -> str:
    """The error line for roles that put an author on two sides, with the worst pair shown."""
    first = users.select("user_id", "group", pl.col("role").cast(pl.Enum(SIDES))).sort("user_id")
    first = first.unique(["group", "role"], keep="first", maintain_order=True)
    pairs = first.join(first, on="group", suffix="_other").filter(
        pl.col("role") < pl.col("role_other")
    )
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


def _empty_side(side: str, given: bool, counts: dict[str, int]) -> str:
    if side == "few_shot" and not given and not counts["users_with_query"]:
        return f"none of {counts['users']} users has a query to be scored on; add queries"
    name = {"base": "base", "anchor": "anchor candidate", "few_shot": "few-shot"}[side]
    hint = "give more users, or change split.base_share and split.anchor_share"
    if given:
        hint = f"add {name} users by other authors"
    return (
        f"no {name} user is left of {counts['users']} users by {counts['groups']} authors "
        f"({counts['removed_shared_group']} removed because their author stands on another side, "
        f"{counts['removed_few_shot_without_query']} few-shot users have no query); {hint}"
    )

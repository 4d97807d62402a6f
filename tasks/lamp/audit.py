"""Audit of the data before training: authors, leaks, duplicates, labels, lengths.

It looks at content alone: ids and file names do not tell who shares what.
"""

import math
from collections import Counter
from collections.abc import Mapping
from statistics import median
from typing import Any

import polars as pl

from tasks.lamp.citations import UNASKED
from tasks.lamp.content import about_and_answer
from tasks.lamp.definitions import LampTask
from tasks.lamp.folders import ROLES
from tasks.lamp.kept import DUPLICATE_ITEM, EMPTY_ITEM, EMPTY_QUERY, EMPTY_USER, ORPHAN_QUERY


def audit(users: pl.DataFrame, dropped: Mapping[str, int], task: LampTask) -> dict[str, Any]:
    """What a reader of the scores must know of the users they come from, ready for JSON.

    users: all users as they were read (`splits.Split.users`), with texts or their keys
    (`content.keyed`). dropped: counts by reason (`formats.Found.dropped`). Returns
    groups: {"all", "few_shot"}: {size: how many groups have it}, sizes as text.
    queries: {"all", "few_shot"}: {"asked"; "text", "text_and_answer": where the query's text (with
        its gold) stands in the profiles of all users, as `query_places`}.
    shared_groups: as the function.
    duplicates: {"dropped": items that stood twice in one profile; "texts": distinct texts of
        profile items; "repeated_texts": those in several profiles; "texts_with_several_answers"}.
    empty: what was dropped because a text, an answer or a profile was empty, by reason.
    labels: {"items", "golds"} (golds: of few-shot users): {"shares", "majority": the commonest,
        "majority_share", "entropy_bits"}; None for free text, and where there is nothing to count.
    profile_lengths: {"base", "anchor", "few_shot"}: {"min", "median", "max"}; None without users.
    """
    sides = _sides(users)
    few_shot = sides["few_shot"]
    items = _flat(users, "profile", task)
    texts = items.group_by("about").agg(pl.col("row", "answer").n_unique())
    golds = _flat(few_shot, "query", task)
    asked = {"all": _flat(users, "query", task), "few_shot": golds}
    return {
        "groups": {"all": _sizes(users), "few_shot": _sizes(few_shot)},
        "queries": {
            name: {
                "asked": queries.height,
                "text": _places(queries, items, ["about"]),
                "text_and_answer": _places(queries, items, ["about", "answer"]),
            }
            for name, queries in asked.items()
        },
        "shared_groups": shared_groups(users),
        "duplicates": {
            "dropped": dropped.get(DUPLICATE_ITEM, 0),
            "texts": texts.height,
            "repeated_texts": int((texts["row"] > 1).sum()),
            "texts_with_several_answers": int((texts["answer"] > 1).sum()),
        },
        "empty": {
            reason: dropped[reason]
            for reason in (EMPTY_ITEM, EMPTY_QUERY, EMPTY_USER, ORPHAN_QUERY)
            if reason in dropped
        },
        "labels": {
            "items": _balance(items["answer"].filter(items["answer"] != UNASKED), task),
            "golds": _balance(golds["answer"], task),
        },
        "profile_lengths": {role: _lengths(side) for role, side in sides.items()},
    }


def query_places(asking: pl.DataFrame, profiles: pl.DataFrame, task: LampTask) -> dict[str, int]:
    """In how many queries of `asking` the text stands in a profile of `profiles`.

    Both frames: columns user_id, group, profile, query. A text stands where an item is about the
    same (tasks/lamp/content.py), whatever its answer. Each query is counted once per key:
    any: in any profile; own: in the asking user's; sibling: in another user's of the same group;
    other: in a profile of another group.
    """
    return _places(_flat(asking, "query", task), _flat(profiles, "profile", task), ["about"])


def shared_groups(users: pl.DataFrame) -> dict[str, int]:
    """Count the users whose group has a user on a later side as well.

    users: columns group and role. Returns {"anchor": candidates in a few-shot user's group, "base":
    base users in a few-shot user's or an anchor candidate's}.
    """
    sides = _sides(users)
    later = pl.concat([sides["anchor"], sides["few_shot"]])
    return {
        "anchor": sides["anchor"].join(sides["few_shot"], on="group", how="semi").height,
        "base": sides["base"].join(later, on="group", how="semi").height,
    }


def _sides(users: pl.DataFrame) -> dict[str, pl.DataFrame]:
    return {role: users.filter(pl.col("role") == role) for role in ROLES}


def _flat(users: pl.DataFrame, column: str, task: LampTask) -> pl.DataFrame:
    """One row per item or query: row (of its user), user, group (hashes), about, answer."""
    flat = users.select(pl.col("group").hash(), column, user=pl.col("user_id").hash())
    flat = flat.with_row_index("row").explode(column).drop_nulls(column)
    flat = flat.with_columns(**about_and_answer(column, task)).drop(column)
    if column == "query" and task.items == "completed":
        return flat.with_columns(about="answer")
    return flat


def _places(queries: pl.DataFrame, items: pl.DataFrame, by: list[str]) -> dict[str, int]:
    """`query_places`, by counting who holds what is asked: all users, the group's, the user."""
    asked_for = items.join(queries, on=by, how="semi")
    holders = asked_for.select(*by, "group", "user").unique()
    counted = queries.select(*by, "group", "user")
    for name, keys in (("all", by), ("near", [*by, "group"]), ("own", [*by, "group", "user"])):
        counts = holders.group_by(keys).agg(pl.len().cast(pl.Int64).alias(name))
        counted = counted.join(counts, on=keys, how="left").with_columns(pl.col(name).fill_null(0))
    return {
        "any": int((counted["all"] > 0).sum()),
        "own": int((counted["own"] > 0).sum()),
        "sibling": int((counted["near"] > counted["own"]).sum()),
        "other": int((counted["all"] > counted["near"]).sum()),
    }


def _sizes(users: pl.DataFrame) -> dict[str, int]:
    """Size of a group -> how many have it, smallest first; keys as JSON will have them."""
    sizes = Counter(Counter(users["group"]).values())
    return {str(size): count for size, count in sorted(sizes.items())}


def _balance(answers: pl.Series, task: LampTask) -> dict[str, Any] | None:
    if not task.labels or answers.is_empty():
        return None
    counts = dict(answers.value_counts().iter_rows())
    shares = {label: counts.get(label, 0) / len(answers) for label in task.labels}
    majority = max(task.labels, key=shares.__getitem__)
    return {
        "shares": {label: round(share, 6) for label, share in shares.items()},
        "majority": majority,
        "majority_share": round(shares[majority], 6),
        "entropy_bits": round(sum(-s * math.log2(s) for s in shares.values() if s), 6),
    }


def _lengths(users: pl.DataFrame) -> dict[str, float] | None:
    lengths = users["profile"].list.len().to_list()
    if not lengths:
        return None
    return {"min": min(lengths), "median": float(median(lengths)), "max": max(lengths)}

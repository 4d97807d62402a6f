"""What a fair evaluation must know about its data: authors, leaks, duplicates, labels, lengths.

Found by content alone, before anything is trained: ids and file names say nothing about it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from tasks.lamp.citations import UNASKED
from tasks.lamp.definitions import LampTask
from tasks.lamp.formats import DUPLICATE_ITEM, EMPTY_ITEM, EMPTY_QUERY, EMPTY_USER, ORPHAN_QUERY
from tasks.lamp.prompts import question_text

# (text, answer or "") -> the users whose profile holds it, as (user_id, group).
Holders = dict[tuple[str, str], set[tuple[str, str]]]


def audit(users: pl.DataFrame, dropped: Mapping[str, int], task: LampTask) -> dict[str, Any]:
    """Everything a reader of the scores must know of the users they come from, ready for JSON.

    users: columns user_id, group, role (base, anchor, few_shot), profile, query; all users as they
    were read, before any is removed or pooled (`groups.Split.users`). dropped: counts by reason
    (`formats.Loaded.dropped`).

    Returns
    groups: {"all", "few_shot"}: {size: how many groups have it}, sizes as text.
    queries: {"all", "few_shot"}: {"asked"; "text", "text_and_answer": where the query's text (with
        its gold) stands in the profiles of all users, as `query_places`}.
    shared_groups: users, by role, whose group has a few-shot user, or for a base user an anchor
        candidate: {"anchor", "base"}.
    duplicates: {"dropped": items that stood twice in one profile; "texts": distinct texts of
        profile items; "repeated_texts": those in several profiles; "texts_with_several_answers"}.
    empty: what was dropped because a text, an answer or a profile was empty, by reason.
    labels: {"items", "golds"} (golds: of few-shot users, the ones scored): {"shares": {label:
        share}, "majority": the commonest, "majority_share", "entropy_bits"}; None for free text,
        and where there is nothing to count.
    profile_lengths: {"base", "anchor", "few_shot"}: {"min", "median", "max"}; None without users.
    """
    few_shot = users.filter(pl.col("role") == "few_shot")
    items = [item for profile in users["profile"].to_list() for item in profile]
    golds = [query["gold"] for queries in few_shot["query"].to_list() for query in queries]
    places = {
        name: (_holders(users, task, with_gold), with_gold)
        for name, with_gold in (("text", False), ("text_and_answer", True))
    }
    return {
        "groups": {"all": _sizes(users), "few_shot": _sizes(few_shot)},
        "queries": {
            name: {
                "asked": int(asking["query"].list.len().sum()),
                **{
                    what: _places(asking, holders, task, with_gold)
                    for what, (holders, with_gold) in places.items()
                },
            }
            for name, asking in (("all", users), ("few_shot", few_shot))
        },
        "shared_groups": shared_groups(users),
        "duplicates": {"dropped": dropped.get(DUPLICATE_ITEM, 0), **_repeated(users)},
        "empty": {
            reason: dropped[reason]
            for reason in (EMPTY_ITEM, EMPTY_QUERY, EMPTY_USER, ORPHAN_QUERY)
            if reason in dropped
        },
        "labels": {
            "items": _balance([i["answer"] for i in items if i["answer"] != UNASKED], task),
            "golds": _balance(golds, task),
        },
        "profile_lengths": {
            role: _lengths(users.filter(pl.col("role") == role))
            for role in ("base", "anchor", "few_shot")
        },
    }


def query_places(
    asking: pl.DataFrame, profiles: pl.DataFrame, task: LampTask, *, with_gold: bool = False
) -> dict[str, int]:
    """In how many queries of `asking` the text stands in a profile of `profiles`.

    Both frames: columns user_id, group, profile, query. Texts are compared with white space
    normalised; answers are not looked at, unless `with_gold`: then the item must carry the
    query's gold too. LaMP-1's texts are compared by the paper's title alone (`LampTask.subject`):
    which reference stood beside its own, and in which order, is no part of a paper. Of LaMP-7's
    queries it is the gold that is looked for: their text is a paraphrase, the gold is the tweet.

    Returns counts of queries, each query counted once per key:
    any: in any profile; own: in the asking user's; sibling: in another user's of the same group;
    other: in a profile of another group.
    """
    return _places(asking, _holders(profiles, task, with_gold), task, with_gold)


def shared_groups(users: pl.DataFrame) -> dict[str, int]:
    """How many anchor candidates and base users stand in a group that a later side has too.

    users: columns group and role. Returns {"anchor": of those in a few-shot user's group, "base":
    in a few-shot user's or an anchor candidate's}.
    """
    sides = {role: users.filter(pl.col("role") == role) for role in ("base", "anchor", "few_shot")}
    later = pl.concat([sides["anchor"], sides["few_shot"]])
    return {
        "anchor": sides["anchor"].join(sides["few_shot"], on="group", how="semi").height,
        "base": sides["base"].join(later, on="group", how="semi").height,
    }


def _holders(profiles: pl.DataFrame, task: LampTask, with_gold: bool) -> Holders:
    holders: Holders = defaultdict(set)
    for user_id, group, profile in profiles.select("user_id", "group", "profile").iter_rows():
        for item in profile:
            answer = item["answer"] if with_gold else ""
            holders[_plain(task.subject(item["text"])), answer].add((user_id, group))
    return dict(holders)


def _places(
    asking: pl.DataFrame, holders: Holders, task: LampTask, with_gold: bool
) -> dict[str, int]:
    counts = dict.fromkeys(("any", "own", "sibling", "other"), 0)
    for user_id, group, queries in asking.select("user_id", "group", "query").iter_rows():
        for query in queries:
            asked = query["gold"] if task.items == "completed" else query["input"]
            text = _plain(task.subject(question_text(asked, task)))
            found = holders.get((text, query["gold"] if with_gold else ""), set())
            counts["any"] += bool(found)
            counts["own"] += (user_id, group) in found
            counts["sibling"] += any(g == group and u != user_id for u, g in found)
            counts["other"] += any(g != group for _, g in found)
    return counts


def _sizes(users: pl.DataFrame) -> dict[str, int]:
    """Size of a group -> how many have it, smallest first; keys as JSON will have them."""
    sizes = Counter(Counter(users["group"].to_list()).values())
    return {str(size): sizes[size] for size in sorted(sizes)}


def _repeated(users: pl.DataFrame) -> dict[str, int]:
    answers: dict[str, set[str]] = defaultdict(set)
    holders: Counter[str] = Counter()
    for profile in users["profile"].to_list():
        for item in profile:
            answers[_plain(item["text"])].add(item["answer"])
        holders.update({_plain(item["text"]) for item in profile})
    return {
        "texts": len(answers),
        "repeated_texts": sum(count > 1 for count in holders.values()),
        "texts_with_several_answers": sum(len(given) > 1 for given in answers.values()),
    }


def _balance(answers: Sequence[str], task: LampTask) -> dict[str, Any] | None:
    if not task.labels or not answers:
        return None
    counts = Counter(answers)
    shares = {label: counts[label] / len(answers) for label in task.labels}
    majority = max(task.labels, key=shares.__getitem__)
    return {
        "shares": {label: round(share, 6) for label, share in shares.items()},
        "majority": majority,
        "majority_share": round(shares[majority], 6),
        "entropy_bits": round(sum(-s * math.log2(s) for s in shares.values() if s), 6),
    }


def _lengths(users: pl.DataFrame) -> dict[str, float] | None:
    if users.is_empty():
        return None
    lengths = pl.Series([len(profile) for profile in users["profile"].to_list()])
    return {"min": lengths.min(), "median": lengths.median(), "max": lengths.max()}  # type: ignore[dict-item]


def _plain(text: str) -> str:
    return " ".join(text.split())

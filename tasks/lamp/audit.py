"""Where the queries' texts already stand: what a fair evaluation must know about its data."""

from __future__ import annotations

import polars as pl

from tasks.lamp.definitions import LampTask
from tasks.lamp.prompts import question_text


def query_places(
    asking: pl.DataFrame, profiles: pl.DataFrame, task: LampTask, *, with_gold: bool = False
) -> dict[str, int]:
    """In how many queries of `asking` the text stands in a profile of `profiles`.

    Both frames: columns user_id, group, profile, query. Texts are compared with white space
    normalised; answers are not looked at, unless `with_gold`: then the item must carry the
    query's gold too. LaMP-1's texts are compared by the paper's title alone (`LampTask.subject`):
    which reference stood beside its own, and in which order, is no part of a paper.

    Returns counts of queries, each query counted once per key:
    any: in any profile; own: in the asking user's; sibling: in another user's of the same group;
    other: in a profile of another group.
    """
    holders: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for user_id, group, profile in profiles.select("user_id", "group", "profile").iter_rows():
        for item in profile:
            answer = item["answer"] if with_gold else ""
            holders.setdefault((_plain(task.subject(item["text"])), answer), set()).add(
                (user_id, group)
            )
    counts = dict.fromkeys(("any", "own", "sibling", "other"), 0)
    for user_id, group, queries in asking.select("user_id", "group", "query").iter_rows():
        for query in queries:
            text = _plain(task.subject(question_text(query["input"], task)))
            found = holders.get((text, query["gold"] if with_gold else ""), set())
            counts["any"] += bool(found)
            counts["own"] += (user_id, group) in found
            counts["sibling"] += any(g == group and u != user_id for u, g in found)
            counts["other"] += any(g != group for _, g in found)
    return counts


def _plain(text: str) -> str:
    return " ".join(text.split())

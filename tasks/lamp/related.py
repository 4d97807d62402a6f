"""Questions about LaMP-1's papers where the data name no citations, as in LaMP's official files.

The question keeps the words of the task, and asks for the author's most similar other paper against
a paper of another author. That shows what else the author writes, not what the author cites, which
OPPU, Per-Pcs and MTA train on: their files add the citations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import polars as pl

from tasks.lamp.citations import ASKS, UNASKED, as_item
from tasks.lamp.history import Neighbours
from tasks.lamp.statistics import generator_of

# The other paper is the most similar one of this many other authors.
OTHER_AUTHORS = 8
NO_RELATED = "paper without a citation, another one of its author or another author"


def has_unasked(users: pl.DataFrame) -> bool:
    """Whether a paper in the column profile has no question."""
    answers = users["profile"].explode().drop_nulls().struct.field("answer")
    return bool((answers == UNASKED).any())


def ask_related(users: pl.DataFrame, others: pl.DataFrame, seed: int) -> tuple[pl.DataFrame, int]:
    """Return `users` with a question for each paper that has none, and how many papers were lost.

    Both frames: columns group (the author) and profile. The paper's own reference is the title of
    the user's most similar other paper. The other reference is the most similar title of
    OTHER_AUTHORS authors of `others`, drawn by the seed and the author. Both by BM25 over titles. A
    paper that lacks either is left out and counted.
    """
    titles: dict[str, list[str]] = {}
    for group, profile in others.select("group", "profile").iter_rows():
        titles.setdefault(group, []).extend(_titles(profile))
    names = sorted(titles)
    profiles = [
        _ask(profile, _pool(titles, names, group, seed))
        for group, profile in users.select("group", "profile").iter_rows()
    ]
    lost = int(users["profile"].list.len().sum()) - sum(map(len, profiles))
    column = pl.Series("profile", profiles, dtype=users.schema["profile"])
    return users.with_columns(column), lost


def _ask(profile: list[dict[str, str]], pool: list[str]) -> list[dict[str, str]]:
    """One user's items with a question each; those that get none are left out."""
    own = _titles(profile)
    pool = [title for title in pool if title not in own]
    nearest, theirs = Neighbours(own).others(len(own)), Neighbours(pool)
    items = []
    for index, (item, title) in enumerate(zip(profile, own, strict=True)):
        if item["answer"] != UNASKED:
            items.append(item)
            continue
        near = [own[n] for n in nearest[index] if own[n] != title]
        if near and pool:
            (far,) = theirs.find(title, 1)
            text, label = as_item(title, near[0], pool[far], about=title)
            items.append(item | {"text": text, "answer": label})
    return items


def _pool(
    titles: Mapping[str, Sequence[str]], names: Sequence[str], group: str, seed: int
) -> list[str]:
    """The titles of some other authors, the same for every window of one author. names: sorted."""
    drawn = generator_of(str(seed), group).choice(
        len(names), min(OTHER_AUTHORS + 1, len(names)), replace=False
    )
    others = [names[number] for number in drawn if names[number] != group][:OTHER_AUTHORS]
    return [title for name in others for title in titles[name]]


def _titles(profile: Iterable[dict[str, str]]) -> list[str]:
    """Each item's title, with or without a question."""
    return [item["text"].partition(ASKS)[0].removeprefix('"').removesuffix('"') for item in profile]

"""Check LaMP-1's papers as a file has them, and make a question of each that names a citation.

`citation` may be a list of titles, as citation graphs have it; then one of them is asked about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any, NamedTuple

from tasks.errors import InputError
from tasks.lamp.checks import fields_of, kind, text
from tasks.lamp.citations import UNASKED, questions


class Papers(NamedTuple):
    """items: of `citations.questions`. lost: how many papers had nothing to be asked against.
    drawn: how many papers had several citations, of which one was drawn."""

    items: list[dict[str, Any]]
    lost: int = 0
    drawn: int = 0


def read_papers(papers: list[Any], where: str, task: str, seed: int) -> Papers:
    """Return one user's papers as items: the title is a question, the citation its label.

    A paper may name its own `negative`, as those of the synthetic worlds do. Where no paper of a
    profile names a citation, as in LaMP's official files, none is asked about yet
    (`related.ask_related`). Raises InputError for a paper that is not of that shape.
    """
    named = any(isinstance(paper, dict) and "citation" in paper for paper in papers)
    read, drawn = [], 0
    for number, paper in enumerate(papers):
        place = f"{where}, profile item {number}"
        cited = _cited(paper, place)
        if cited is not None:
            paper = paper | {"citation": None}
        fields = fields_of(paper, place, ("title", "citation") if named else ("title",), task)
        for name in ("abstract", "negative"):
            fields[name] = text(paper.get(name), place, name)
        if not named:
            title = fields["title"].strip()
            fields |= {"title": f'"{title}"' if title else "", "citation": UNASKED}
        if cited:
            fields["citation"] = one_of(cited, fields["title"], seed)
            drawn += len(cited) > 1
        known = {"cited": cited or {fields["citation"]}}
        read.append({"id": str(number), **paper, **fields, **known})
    if not named:
        return Papers(read)
    items = questions(read)
    return Papers(items, len(read) - len(items), drawn)


def one_of(cited: Collection[str], title: str, seed: int) -> str:
    """Draw one of a paper's citations, by the seed and the paper alone.

    So windows over one author's papers agree on it, in any order of records and citations.
    """
    return min(
        cited, key=lambda own: hashlib.sha256(f"{seed}\x1f{title}\x1f{own}".encode()).digest()
    )


def _cited(paper: Any, place: str) -> set[str] | None:
    """The titles in a paper's list of citations, without empty ones; None where it is no list."""
    cited = paper.get("citation") if isinstance(paper, dict) else None
    if not isinstance(cited, list):
        return None
    for title in cited:
        if not isinstance(title, str):
            raise InputError(
                f"{place}: citation is a list with {kind(title)} in it; it must hold the titles of "
                "the papers that are cited"
            )
    return {text(title, place, "citation") for title in cited if title.strip()}

"""LaMP-1's papers as a file has them: checked, and with a question for each that names a citation.

A paper may name all it cites, as citation graphs do: `citation` is then a list of titles, of which
one is asked about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any, NamedTuple

from tasks.errors import InputError
from tasks.lamp.checks import fields_of, kind, text
from tasks.lamp.citations import UNASKED, questions


class Papers(NamedTuple):
    """items: as `citations.questions` gives them. lost: papers with nothing to ask against. drawn:
    papers with several citations, of which one was drawn."""

    items: list[dict[str, Any]]
    lost: int = 0
    drawn: int = 0


def read_papers(papers: list[Any], where: str, task: str, seed: int) -> Papers:
    """One user's papers as items whose title is a question and whose citation is its label.

    A paper may name its own `negative`. Ours do: a citation of the same user, as the nearest
    paper's is, shows nothing of the user's taste. Where no paper of a profile names a citation, as
    in LaMP's official files, they stay to be asked about (`related.ask_related`).
    Raises InputError for a paper that is not of that shape.
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
    """One of a paper's citations, each as likely, by the seed and the paper alone.

    Windows over one author's papers so agree on it, and no order of records or citations matters.
    """
    return min(
        cited, key=lambda own: hashlib.sha256(f"{seed}\x1f{title}\x1f{own}".encode()).digest()
    )


def _cited(paper: Any, place: str) -> set[str] | None:
    """The titles of a list of citations, without empty ones; None where it is no list."""
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

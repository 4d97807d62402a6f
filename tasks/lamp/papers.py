"""LaMP-1's papers as a file has them, and a question of each that names a citation.

`citation` may be a list of titles, as citation graphs have it; then one of them is asked about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any, NamedTuple

from tasks.errors import InputError
from tasks.lamp.checks import item_fields, kind, text
from tasks.lamp.citations import UNASKED, as_item, hard_negatives


class Papers(NamedTuple):
    """items: (id, question, label). lost: how many papers had nothing to be asked against.
    drawn: how many papers had several citations, of which one was drawn."""

    items: list[tuple[str, str, str]]
    lost: int = 0
    drawn: int = 0


class _Paper(NamedTuple):
    id: str
    title: str
    abstract: str
    negative: str
    citation: str  # the one that is asked about
    cited: Collection[str]  # all of them


def read_papers(papers: list[Any], where: str, task: str, seed: int) -> Papers:
    """Return one user's papers as items: the title is a question, the citation its label.

    A paper may name its own `negative`, as those of the synthetic worlds do. Where no paper of a
    profile names a citation, as in LaMP's official files, none is asked about yet
    (`related.ask_related`). A paper without title or citation has no text.
    Raises InputError for a paper that is not of that shape.
    """
    named = any(isinstance(paper, dict) and "citation" in paper for paper in papers)
    read = [
        _paper(paper, number, f"{where}, profile item {number}", named, task, seed)
        for number, paper in enumerate(papers)
    ]
    if not named:
        titles = [(one.id, one.title.strip()) for one in read]
        return Papers([(own, f'"{title}"' if title else "", UNASKED) for own, title in titles])
    negatives = hard_negatives(
        [f"{one.title} {one.abstract}" for one in read],
        [one.citation for one in read],
        [one.negative for one in read],
        [one.cited for one in read],
    )
    items = []
    for one, negative in zip(read, negatives, strict=True):
        if not one.title.strip() or not one.citation.strip():
            items.append((one.id, "", one.citation))
        elif negative is not None:
            items.append((one.id, *as_item(one.title, one.citation, negative)))
    return Papers(items, len(read) - len(items), sum(len(one.cited) > 1 for one in read))


def _paper(paper: Any, number: int, where: str, named: bool, task: str, seed: int) -> _Paper:
    listed = isinstance(paper, dict) and isinstance(paper.get("citation"), list)
    names = ("title", "citation") if named else ("title",)
    given = paper | {"citation": None} if listed else paper
    paper_id, title, *own = item_fields(given, number, where, names, task)
    cited = set(own)
    if listed:
        for one in paper["citation"]:
            if not isinstance(one, str):
                raise InputError(
                    f"{where}: citation is a list with {kind(one)} in it; it must hold the titles "
                    "of the papers that are cited"
                )
        cited = {text(one, where, "citation") for one in paper["citation"] if one.strip()}
    return _Paper(
        paper_id,
        title,
        *(text(paper.get(name), where, name) for name in ("abstract", "negative")),
        citation=one_of(cited, title, seed),
        cited=cited,
    )


def one_of(cited: Collection[str], title: str, seed: int) -> str:
    """Draw one of a paper's citations, by the seed and the paper alone; "" of none.

    So windows over one author's papers agree on it, in any order of records and citations.
    """
    return min(
        cited,
        key=lambda own: hashlib.sha256(f"{seed}\x1f{title}\x1f{own}".encode()).digest(),
        default="",
    )

"""LaMP-1's question, in the wording of LaMP's data: which of two references belongs to a paper?

A profile item of LaMP-1 is a paper, not a question, so a question is built. Where the data name
what a paper cites (the user files of OPPU and Per-Pcs), it asks for that citation against another
one. `citation` may be a list of titles, as citation graphs have it; then one of them is asked
about. LaMP's official files name none; see tasks/lamp/related.py.

The order of the two references depends only on what is asked about, so windows over one author's
papers agree on it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from tasks.errors import InputError
from tasks.lamp.history import Neighbours
from tasks.lamp.records import item_fields, kind, text

ASKS = ", which reference is related? Just answer with [1] or [2] without explanation."
LABELS = ("[1]", "[2]")
# The answer of a paper without a question yet; its text is its title as a query has it.
UNASKED = "no citation"

_QUESTION = re.compile(f'^"(.*)"{re.escape(ASKS)} \\[1\\]: "(.*)" \\[2\\]: "(.*)"$', re.DOTALL)


def question(title: str, first: str, second: str) -> str:
    """The question as it stands in a query, after "... the paper with the title "."""
    return f'"{title}"{ASKS} [1]: "{first}" [2]: "{second}"'


def parts(text: str) -> tuple[str, str, str] | None:
    """Title, first and second reference of a `question`; None for any other text."""
    found = _QUESTION.match(text)
    return None if found is None else (found[1], found[2], found[3])


def as_item(title: str, own: str, other: str, about: str | None = None) -> tuple[str, str]:
    """Return (question, label) about one paper: its `own` reference against the `other`.

    about: the text that decides their order; None: the title and its own reference.
    """
    decides = f"{title}\x1f{own}" if about is None else about
    if hashlib.sha256(decides.encode()).digest()[0] % 2:
        return question(title, own, other), LABELS[0]
    return question(title, other, own), LABELS[1]


def hard_negatives(
    texts: Sequence[str],
    citations: Sequence[str],
    given: Sequence[str],
    cited: Sequence[Collection[str]],
) -> list[str | None]:
    """For each paper of one user, the reference that its citation is asked against.

    texts: title and abstract. given: the negative that the data name. cited: all that the paper
    cites. The given negative is used if it is not empty and not cited; else the citation of the
    BM25-nearest other paper for which that holds; None if there is none.
    """
    usable = [
        bool(other.strip()) and other not in own for other, own in zip(given, cited, strict=True)
    ]
    if all(usable):
        return list(given)
    found: list[str | None] = []
    for index, nearest in enumerate(Neighbours(texts).others(len(texts))):
        others = [given[index]] if usable[index] else [citations[n] for n in nearest]
        own = cited[index]
        found.append(next((c for c in others if c.strip() and c not in own), None))
    return found


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

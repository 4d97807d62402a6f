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


class Paper(NamedTuple):
    """A paper as the data have it. citation: the one that is asked about. cited: all of them.
    negative: another reference that the data name to ask against, or ""."""

    id: str
    title: str
    abstract: str
    negative: str
    citation: str
    cited: Collection[str]

    def may_face(self, reference: str) -> bool:
        return bool(reference.strip()) and reference not in self.cited


class Papers(NamedTuple):
    """items: (id, question, label). lost: how many papers had nothing to be asked against.
    drawn: how many papers had several citations, of which one was drawn."""

    items: list[tuple[str, str, str]]
    lost: int = 0
    drawn: int = 0


def hard_negatives(papers: Sequence[Paper]) -> list[str | None]:
    """For each paper of one user, the reference that its citation is asked against.

    Its own negative if that is usable; else the first usable citation of the other papers, the
    BM25-nearest first; None if there is none. Usable is what is not empty and not cited.
    """
    if all(one.may_face(one.negative) for one in papers):
        return [one.negative for one in papers]
    nearest = Neighbours([f"{one.title} {one.abstract}" for one in papers]).others(len(papers))
    found: list[str | None] = []
    for one, others in zip(papers, nearest, strict=True):
        references = (one.negative, *(papers[other].citation for other in others))
        found.append(next(filter(one.may_face, references), None))
    return found


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
    items: list[tuple[str, str, str]] = []
    for one, negative in zip(read, hard_negatives(read), strict=True):
        if not one.title.strip() or not one.citation.strip():
            items.append((one.id, "", one.citation))
        elif negative is not None:
            items.append((one.id, *as_item(one.title, one.citation, negative)))
    return Papers(items, len(read) - len(items), sum(len(one.cited) > 1 for one in read))


def _paper(paper: Any, number: int, where: str, named: bool, task: str, seed: int) -> Paper:
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
    abstract, negative = (text(paper.get(name), where, name) for name in ("abstract", "negative"))
    return Paper(paper_id, title, abstract, negative, one_of(cited, title, seed), cited)


def one_of(cited: Collection[str], title: str, seed: int) -> str:
    """Draw one of a paper's citations, by the seed and the paper alone; "" of none.

    So windows over one author's papers agree on it, in any order of records and citations.
    """
    return min(
        cited,
        key=lambda own: hashlib.sha256(f"{seed}\x1f{title}\x1f{own}".encode()).digest(),
        default="",
    )

"""LaMP-1's papers become questions: which of two references belongs to a paper?

Where the data name what a paper cites (the user files of OPPU and Per-Pcs), a question asks for
that citation against another one. `citation` may be a list of titles, as citation graphs have it;
then one of them is asked about. LaMP's official files name none: a question asks for the author's
most similar other paper against a paper of another author. That shows what else the author writes,
not what the author cites, which OPPU, Per-Pcs and MTA train on.

The order of the two references depends only on what is asked about, so windows over one author's
papers agree on it.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl

from tasks.errors import InputError
from tasks.lamp.definitions import ASKS, LABELS, question
from tasks.lamp.history import Neighbours
from tasks.lamp.records import as_text, item_fields, type_name
from tasks.lamp.statistics import generator_of

# The answer of a paper without a question yet; its text is its title as a query has it.
UNASKED = "no citation"
# The other paper is the most similar one of this many other authors.
OTHER_AUTHORS = 8
NO_RELATED = "paper without a citation, another one of its author or another author"


def as_item(title: str, cited: str, other: str, about: str | None = None) -> tuple[str, str]:
    """Return (question, label) about one paper: the reference `cited` against the `other`.

    about: the text that decides their order; None: the title and the cited one.
    """
    decides = f"{title}\x1f{cited}" if about is None else about
    if hashlib.sha256(decides.encode()).digest()[0] % 2:
        return question(title, cited, other), LABELS[0]
    return question(title, other, cited), LABELS[1]


class Paper(NamedTuple):
    """A paper as the data have it. citation: the one of `cited` that is asked about. negative:
    another reference that the data name to ask against, or ""."""

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
    negatives: list[str | None] = []
    for one, others in zip(papers, nearest, strict=True):
        references = (one.negative, *(papers[other].citation for other in others))
        negatives.append(next(filter(one.may_face, references), None))
    return negatives


def read_papers(papers: list[Any], location: str, task: str, seed: int) -> Papers:
    """Return one user's papers as items: the title is a question, the citation its label.

    A paper may name its own `negative`, as those of the synthetic worlds do. Where no paper of a
    profile names a citation, none is asked about yet (`ask_related`). A paper without title or
    citation has no text. Raises InputError for a paper that is not of that shape.
    """
    named = any(isinstance(paper, dict) and "citation" in paper for paper in papers)
    read = [
        _paper(paper, number, f"{location}, profile item {number}", named, task, seed)
        for number, paper in enumerate(papers)
    ]
    if not named:
        titles = [(one.id, one.title.strip()) for one in read]
        return Papers([(name, f'"{title}"' if title else "", UNASKED) for name, title in titles])
    items: list[tuple[str, str, str]] = []
    for one, negative in zip(read, hard_negatives(read), strict=True):
        if not one.title.strip() or not one.citation.strip():
            items.append((one.id, "", one.citation))
        elif negative is not None:
            items.append((one.id, *as_item(one.title, one.citation, negative)))
    return Papers(items, len(read) - len(items), sum(len(one.cited) > 1 for one in read))


def _paper(paper: Any, number: int, location: str, named: bool, task: str, seed: int) -> Paper:
    """One of a list of citations is drawn by the seed and the paper alone.

    So windows over one author's papers agree on it, in any order of records and citations.
    """
    listed = isinstance(paper, dict) and isinstance(paper.get("citation"), list)
    names = ("title", "citation") if named else ("title",)
    without = paper | {"citation": None} if listed else paper
    paper_id, title, *cited = item_fields(without, number, location, names, task)
    if listed:
        for one in paper["citation"]:
            if not isinstance(one, str):
                raise InputError(
                    f"{location}: citation is a list with {type_name(one)} in it; it must hold the "
                    "titles of the papers that are cited"
                )
        cited = [as_text(one, location, "citation") for one in paper["citation"] if one.strip()]
    more = ("abstract", "negative")
    abstract, negative = (as_text(paper.get(name), location, name) for name in more)

    def order(reference: str) -> bytes:
        return hashlib.sha256(f"{seed}\x1f{title}\x1f{reference}".encode()).digest()

    drawn = min(cited, key=order, default="")
    return Paper(paper_id, title, abstract, negative, drawn, {*cited})


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
    profiles = [
        _ask(profile, _pool(titles, group, seed))
        for group, profile in users.select("group", "profile").iter_rows()
    ]
    lost = int(users["profile"].list.len().sum()) - sum(map(len, profiles))
    column = pl.Series("profile", profiles, dtype=users.schema["profile"])
    return users.with_columns(column), lost


def _ask(profile: list[dict[str, str]], pool: list[str]) -> list[dict[str, str]]:
    """One user's items with a question each; those that get none are left out."""
    titles = _titles(profile)
    pool = [title for title in pool if title not in titles]
    nearest, theirs = Neighbours(titles).others(len(titles)), Neighbours(pool)
    items = []
    for index, (item, title) in enumerate(zip(profile, titles, strict=True)):
        if item["answer"] != UNASKED:
            items.append(item)
            continue
        near = [titles[n] for n in nearest[index] if titles[n] != title]
        if near and pool:
            (far,) = theirs.find(title, 1)
            asked, label = as_item(title, near[0], pool[far], about=title)
            items.append(item | {"text": asked, "answer": label})
    return items


def _pool(titles: Mapping[str, Sequence[str]], group: str, seed: int) -> list[str]:
    """The titles of some other authors, the same for every window of one author."""
    names = sorted(titles)
    size = min(OTHER_AUTHORS + 1, len(names))
    drawn = generator_of(str(seed), group).choice(len(names), size, replace=False)
    others = [names[one] for one in drawn if names[one] != group][:OTHER_AUTHORS]
    return [title for name in others for title in titles[name]]


def _titles(profile: Iterable[dict[str, str]]) -> list[str]:
    """Each item's title, with or without a question."""
    return [item["text"].partition(ASKS)[0].removeprefix('"').removesuffix('"') for item in profile]

"""LaMP-1's question, in the wording of LaMP's data: which of two references belongs to a paper?

A profile item of LaMP-1 is a paper, not a question, so a question is built. Where the data name
what a paper cites (the user files of OPPU and Per-Pcs), it asks for that citation against another
one. LaMP's official files do not; see tasks/lamp/related.py.

The order of the two references depends only on what is asked about, so windows over one author's
papers agree on it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence

from tasks.lamp.history import Neighbours

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

"""The items of a profile most like a text, by BM25 (METHOD, Prompts: k = 1 in the paper)."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import bm25s
import numpy as np

# It tells of every index at level DEBUG, whatever level the program has asked for.
logging.getLogger("bm25s").setLevel(logging.WARNING)

# Every word counts, one-letter ones too: no stop words and no stemming, as in rank-bm25, which
# the published code uses.
_WORD = re.compile(r"\w+")


class Neighbours:
    """BM25 over the texts of one profile (Lucene's variant, k1 = 1.5, b = 0.75)."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.size = len(texts)
        tokens = [_words(text) for text in texts]
        self._index: bm25s.BM25 | None = None
        # bm25s divides by the mean length, which profiles without a word do not have.
        if any(tokens):
            self._index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
            self._index.index(tokens, show_progress=False)

    def find(self, text: str, count: int, exclude: int | None = None) -> list[int]:
        """Indices of the `count` items most like `text`, best first, ties by lower index.

        exclude: the index of the item that `text` comes from, which is never its own neighbour.
        Fewer are returned when the profile holds fewer; items without a common word come last.
        """
        words = _words(text)
        scores = np.zeros(self.size)
        if self._index is not None and words:
            scores = np.asarray(self._index.get_scores(words))
        order = np.argsort(-scores, kind="stable")
        return [int(index) for index in order if index != exclude][:count]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())

"""The items of a profile that are most like a text, by BM25 (docs/method.md, Prompts).

The published code uses `rank_bm25.BM25Okapi` and builds an index for every item, on the *other*
items of the profile. Here all items of a profile are asked at once, from counts of the whole
profile, with the same numbers: without item i there is one item fewer, each of its words is in one
item fewer, and the mean length is that of the rest.

    idf(w) = ln(N - df(w) + 1/2) - ln(df(w) + 1/2); where that is negative, epsilon times the mean
             of idf over the words of the index (which may be negative itself)
    score  = sum over the words w of the question, repeated ones too, of
             idf(w) * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length / mean length))

Scores that agree to nine decimals are a tie, which the earlier item wins (numpy's argsort, which
rank_bm25 uses, has no rule). Words are those of tasks/lamp/words.py in lower case, without stop
words or stemming. (The published code splits at blanks and keeps the case: `LampTask.lookup`.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.lamp.words import words

if TYPE_CHECKING:
    from scipy import sparse

# Part of every cache key that neighbours decide; raise it when they change.
VERSION = 2

K1, B, EPSILON = 1.5, 0.75, 0.25
TIE_DECIMALS = 9
# Scores held at once (8 bytes each), so that a profile of many thousand items fits.
SCORES = 4_000_000


def lower_words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return words(text.lower())


class Neighbours:
    """BM25 over the texts of one profile of N items. split: gives a text's words."""

    def __init__(
        self, texts: Sequence[str], split: Callable[[str], list[str]] = lower_words
    ) -> None:
        self.size = len(texts)
        self._split = split
        self._words: dict[str, int] = {}
        words_of = [split(text) for text in texts]
        for text_words in words_of:
            for word in text_words:
                self._words.setdefault(word, len(self._words))
        self._counts = self._count(words_of)
        self._lengths = np.array([*map(len, words_of)], dtype=float)
        # How many items have each word.
        self._items = np.bincount(self._counts.indices, minlength=len(self._words))

    def find(self, text: str, count: int) -> list[int]:
        """Indices of the `count` items most like `text`, best first (fewer if there are fewer)."""
        if not self.size:
            return []
        asked = self._asked([text])
        asked.data *= self._weights[asked.indices]
        return self._best(asked, self._lengths.mean()[None], count, None)[0]

    @cached_property
    def _weights(self) -> NDArray[np.floating]:
        """Each word's idf, a negative one replaced as rank_bm25 does."""
        idf = _idf(self._items, self.size)
        if len(idf):
            idf[idf < 0] = EPSILON * idf.mean()
        return idf

    def others(self, count: int, questions: Sequence[str] | None = None) -> list[list[int]]:
        """For each item the indices of the `count` *other* items most like it, best first.

        questions: for each item what is asked instead of its own text.
        """
        if self.size < 2:
            return [[] for _ in range(self.size)]
        rest = self.size - 1
        counts = self._counts
        rows, idf = self._elsewhere(counts)
        # The mean over the index of all but item i: of the words of the whole profile, the item's
        # own count as they stand elsewhere. A word of every item is never a word of others only.
        whole = np.where(self._items <= rest, _idf(np.minimum(self._items, rest), rest), 0.0)
        sums = whole.sum() + np.bincount(rows, idf - whole[counts.indices], self.size)
        missing = np.bincount(rows, self._items[counts.indices] == 1, self.size)
        floor = EPSILON * sums / np.maximum(len(whole) - missing, 1)
        asked = counts.copy()
        if questions is not None:
            asked = self._asked(questions)
            rows, idf = self._elsewhere(asked)
        asked.data *= np.where(idf < 0, floor[rows], idf)
        means = (self._lengths.sum() - self._lengths) / rest
        nearest: list[list[int]] = []
        step = max(1, SCORES // self.size)
        for start in range(0, self.size, step):
            items = np.arange(start, min(start + step, self.size))
            nearest += self._best(asked[items], means[items], count, items)
        return nearest

    def _elsewhere(self, asked: sparse.csr_array) -> tuple[np.ndarray, np.ndarray]:
        """Per number in `asked` [N, words]: its row, and the word's idf among the other items.

        The idf is 0 for a word of the row's own item alone: the others' index lacks it.
        """
        rows = np.repeat(np.arange(self.size), np.diff(asked.indptr))
        items = self._items[asked.indices] - (self._counts[rows, asked.indices] > 0)
        return rows, np.where(items > 0, _idf(items, self.size - 1), 0.0)

    def _asked(self, questions: Sequence[str]) -> sparse.csr_array:
        """`_count` of the words that the index has."""
        return self._count(
            [[w for w in self._split(text) if w in self._words] for text in questions]
        )

    def _count(self, texts: Sequence[Sequence[str]]) -> sparse.csr_array:
        """How often each known word is in each text: [texts, words]."""
        from scipy import sparse  # here, as it takes long and not all need it

        indices = [self._words[word] for own in texts for word in own]
        ends = np.cumsum([0, *map(len, texts)])
        shape = (len(texts), len(self._words))
        table = sparse.csr_array((np.ones(len(indices)), indices, ends), shape)
        table.sum_duplicates()
        return table

    def _best(
        self, asked: sparse.csr_array, means: np.ndarray, count: int, without: np.ndarray | None
    ) -> list[list[int]]:
        """The best items of each question, but not the item `without` that it comes from.

        asked: the words' weights [Q, words]. means: the mean lengths of their indices [Q].
        """
        relative = self._lengths / np.where(means > 0, means, 1.0)[:, None]
        norms = K1 * (1 - B + B * relative)
        scores = np.zeros(norms.shape)
        # A word's share depends on its count and the norm only: one sparse product per count.
        for often in np.unique(self._counts.data):
            marks = (self._counts == often).astype(float)
            scores += (asked @ marks.T).toarray() * (often * (K1 + 1) / (often + norms))
        scores = np.round(scores, TIE_DECIMALS)
        most = self.size
        if without is not None:
            scores[np.arange(len(without)), without] = -np.inf
            most -= 1
        order = np.argsort(-scores, axis=1, kind="stable")
        best: list[list[int]] = order[:, : min(count, most)].tolist()
        return best


def _idf(items: np.ndarray, size: int) -> np.ndarray:
    return np.log(size - items + 0.5) - np.log(items + 0.5)

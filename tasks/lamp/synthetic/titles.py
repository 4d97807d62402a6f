"""LaMP-4 and LaMP-5: in which words and which order a user's headlines or titles say a text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import ClassVar

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from tasks.lamp.options import SyntheticOptions
from tasks.lamp.synthetic.family import Family, Written, plain_joint
from tasks.lamp.synthetic.population import Floats, Ints
from tasks.lamp.synthetic.words import between, chunks, draw, invent_words, shuffled

# 0, 1, 2: the text's subject, action and place; 3, 4: the house words. Three different ones each.
# With the first four, the likeliest template (greedy decoding) scores nearly as well as the best
# sequence. The others were added greedily, each with little in common with those before.
TEMPLATES = (
    (1, 4, 2), (4, 2, 1), (2, 1, 4), (0, 1, 3), (2, 3, 0), (3, 1, 2), (4, 1, 0), (0, 2, 4),
    (2, 0, 3), (3, 2, 1), (1, 3, 0), (0, 4, 2), (4, 0, 1), (1, 2, 4), (1, 0, 3),
)  # fmt: skip
SYMBOLS = 5
LONGEST = 8


class Titles(Family):
    """A theme is a section with three words for each of three roles; a text has one of each, in
    any order, among fillers. A value is a template: the title is three words, some of the text's
    and a house word, in the template's order."""

    house_words: ClassVar[tuple[str, str]]
    text_field: ClassVar[str]
    query_start: ClassVar[str]

    def __init__(self, options: SyntheticOptions, generator: Generator) -> None:
        words = chunks(invent_words(options.themes * 9, self.house_words, generator), 9)
        self.themes = [{"roles": chunks(own, 3)} for own in words]
        self.joint = plain_joint(options)
        self.sequences, self.gain = best_sequences(options.choices)

    def write(self, theme: int, context: int, answer: int, generator: Generator) -> Written:
        words = [draw(role, 1, generator)[0] for role in self.themes[theme]["roles"]]
        text = shuffled(words, between(1, 3, generator), generator)
        everything = (*words, *self.house_words)

        def say(symbols: Sequence[int]) -> str:
            return " ".join(everything[symbol] for symbol in symbols)

        title = say(TEMPLATES[answer])
        fields = {self.text_field: text, "title": title}
        return Written(fields, self.query_start + text, title, lambda n: say(self.sequences[n]))


class Headlines(Titles):
    """LaMP-4."""

    house_words = ("update", "exclusive")
    text_field = "text"
    query_start = "Generate a headline for the following article: "


class Papers(Titles):
    """LaMP-5."""

    house_words = ("towards", "revisited")
    text_field = "abstract"
    query_start = "Generate a title for the following abstract of a paper: "


@lru_cache
def best_sequences(choices: int) -> tuple[list[tuple[int, ...]], Floats]:
    """Every sequence of words worth saying when the answer is one of the first `choices` templates.

    Returns the sequences, and their ROUGE-L F-measure against each template [candidates, choices].

    That these are enough for every distribution over templates: a title has 3 different words, so
    F = 2 LCS / (n + 3) for a candidate of n words.
    (1) A word that is in no template is in no common subsequence; leaving it out raises every F.
    (2) Of two equal words in a row, a title can match one; leaving one out raises every F.
        Words may repeat apart: "a b a" holds both "a b" and "b a".
    (3) F <= 6 / (n + 3), so a candidate of more than 8 words never gets above 0.5. But something
        of 6 words or fewer always gets more than that, whatever the distribution: 11/21 or more,
        the value of the game candidate against template (by linear programming in the tests).
    So sequences of 1 to 8 of the five words without equal neighbours are complete. Of those with
    equal scores the shortest is kept, of these the first.
    """
    kept: dict[bytes, tuple[tuple[int, ...], Floats]] = {}
    for length in range(1, LONGEST + 1):
        sequences = np.array(list(product(range(SYMBOLS), repeat=length)), dtype=np.int8)
        sequences = sequences[(sequences[:, 1:] != sequences[:, :-1]).all(axis=1)]
        common = np.stack([_common(sequences, title) for title in TEMPLATES[:choices]], axis=1)
        scores = 2.0 * common / (length + len(TEMPLATES[0]))
        _, first = np.unique(scores, axis=0, return_index=True)
        for index in np.sort(first):
            key = scores[index].tobytes()
            kept.setdefault(key, (tuple(int(s) for s in sequences[index]), scores[index]))
    return [sequence for sequence, _ in kept.values()], np.array([s for _, s in kept.values()])


def _common(sequences: NDArray[np.int8], title: tuple[int, ...]) -> Ints:
    """Length of the longest common subsequence of each row [N, n] with `title`: [N]."""
    # best[j]: with the title's first j words. The row's words are taken one by one.
    best = np.zeros((len(title) + 1, len(sequences)), dtype=np.int64)
    for column in sequences.T:
        before = best.copy()
        for j, word in enumerate(title):
            best[j + 1] = np.where(
                column == word, before[j] + 1, np.maximum(before[j + 1], best[j])
            )
    longest: Ints = best[-1]
    return longest

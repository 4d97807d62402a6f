"""LaMP-1: which school's work a user cites in a paper on some topic."""

from __future__ import annotations

import re
from itertools import permutations
from typing import Any

import numpy as np
from numpy.random import Generator

from tasks.errors import InputError
from tasks.lamp.citations import LABELS, question
from tasks.lamp.options import SyntheticOptions
from tasks.lamp.synthetic import family
from tasks.lamp.synthetic.family import Family, Reading, Written
from tasks.lamp.synthetic.words import chunks, draw, invent_words, shuffled, theme_index

WORDS_PER_THEME = 8
TITLE_WORDS = 3
ABSTRACT_WORDS = 3
QUERY_START = "For an author who has written the paper with the title "
_REFERENCES = re.compile(r'\[1\]: "(.*)" \[2\]: "(.*)"$')


class Citations(Family):
    """A theme is a topic with C schools; a value is the school that the user cites there. A
    reference is one word, that of its school in the topic, which a small model can tell.

    The cited reference is of school `value` with probability 1 - noise + noise / C, else of any
    other. The reference beside it is of one of the other C - 1 schools, evenly; their order is
    even. With the ordered pair (i, j) of schools as the context:

        p((i, j), "[1]" | v) = p(i | v) / (2 (C - 1))
        p((i, j), "[2]" | v) = p(j | v) / (2 (C - 1))

    A query's pair itself tells of v: the school that the user cites is mostly in it.
    """

    def __init__(self, options: SyntheticOptions, themes: list[dict[str, Any]]) -> None:
        super().__init__(options, themes)
        self.pairs = list(permutations(range(options.choices), 2))
        cited = family.noisy_choice(options.choices, options.label_noise)  # [v, school]
        table = np.stack([cited[:, list(pair)] for pair in self.pairs], axis=1)
        table = table / (2 * (options.choices - 1))
        self.joint = family.for_every_archetype(table, options.archetypes)
        self.gain = np.eye(len(LABELS))
        self._theme = theme_index([theme["schools"] for theme in themes])
        self._school = {
            word: school for theme in themes for school, word in enumerate(theme["schools"])
        }

    @classmethod
    def invent(cls, options: SyntheticOptions, generator: Generator) -> list[dict[str, Any]]:
        size = WORDS_PER_THEME + options.choices
        words = invent_words(options.themes * size, (), generator)
        return [
            {"words": own[:WORDS_PER_THEME], "schools": own[WORDS_PER_THEME:]}
            for own in chunks(words, size)
        ]

    def write(self, theme: int, context: int, answer: int, generator: Generator) -> Written:
        known = self.themes[theme]
        title = shuffled(draw(known["words"], TITLE_WORDS, generator), 1, generator)
        references = [known["schools"][school] for school in self.pairs[context]]
        fields = {
            "title": title,
            "abstract": shuffled(draw(known["words"], ABSTRACT_WORDS, generator), 3, generator),
            "citation": references[answer],
            "negative": references[1 - answer],
        }
        return Written(fields, QUERY_START + question(title, *references), LABELS[answer])

    def read(self, text: str) -> Reading:
        found = _REFERENCES.search(text)
        if found is None:
            raise InputError(f"{text!r}: names no two references; give a synthetic world's texts")
        first, second = (self._school[reference] for reference in found.groups())
        return Reading(self._theme[found[1]], self.pairs.index((first, second)))

    def answers(self, reading: Reading) -> list[str]:
        return list(LABELS)

"""LaMP-2M: which of a theme's plausible tags a user gives to its films."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.random import Generator

from tasks.lamp.definitions import MOVIE_TAGS
from tasks.lamp.options import SyntheticOptions
from tasks.lamp.synthetic.family import Family, Reading, Written, plain_joint
from tasks.lamp.synthetic.words import chunks, draw, invent_words, shuffled, theme_index

WORDS_PER_THEME = 8
THEME_WORDS = (3, 5)
FILLERS_PER_ITEM = (2, 4)
# The wording of LaMP-2M's real queries, so that the marker is found in them.
QUERY_START = (
    "Which tag does this movie relate to among the following tags? Just answer with the tag name "
    f"without further explanation. tags: [{', '.join(MOVIE_TAGS)}] description: "
)


class Movies(Family):
    """A theme has 8 words and C tags; a value is a tag. A text has 3 to 5 of the theme's words,
    one of another theme's, and fillers."""

    def __init__(self, options: SyntheticOptions, themes: list[dict[str, Any]]) -> None:
        super().__init__(options, themes)
        self.joint = plain_joint(options)
        self.gain = np.eye(options.choices)
        self._theme = theme_index([theme["words"] for theme in themes])

    @classmethod
    def invent(cls, options: SyntheticOptions, generator: Generator) -> list[dict[str, Any]]:
        avoid = {word for tag in MOVIE_TAGS for word in tag.split()}
        words = invent_words(options.themes * WORDS_PER_THEME, avoid, generator)
        return [
            {"words": own, "tags": draw(MOVIE_TAGS, options.choices, generator)}
            for own in chunks(words, WORDS_PER_THEME)
        ]

    def write(self, theme: int, context: int, answer: int, generator: Generator) -> Written:
        low, high = THEME_WORDS
        count = int(generator.integers(low, high + 1))
        words = draw(self.themes[theme]["words"], count, generator)
        if len(self.themes) > 1:
            other = (theme + int(generator.integers(1, len(self.themes)))) % len(self.themes)
            words += draw(self.themes[other]["words"], 1, generator)
        low, high = FILLERS_PER_ITEM
        text = shuffled(words, int(generator.integers(low, high + 1)), generator)
        tag = self.themes[theme]["tags"][answer]
        return Written({"tag": tag, "description": text}, QUERY_START + text, tag)

    def read(self, text: str) -> Reading:
        found = [self._theme[word] for word in text.split() if word in self._theme]
        return Reading(int(np.bincount(found).argmax()), 0)

    def answers(self, reading: Reading) -> list[str]:
        return list(self.themes[reading.theme]["tags"])

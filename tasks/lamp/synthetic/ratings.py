"""LaMP-3: how much a user makes of an aspect decides how many stars a review gives."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.random import Generator

from tasks.lamp.options import SyntheticOptions
from tasks.lamp.synthetic.family import Family, Reading, Written
from tasks.lamp.synthetic.population import Floats
from tasks.lamp.synthetic.words import chunks, draw, invent_words, shuffled, theme_index

WORDS_PER_THEME = 4
WORDS_PER_SENTIMENT = 3
SENTIMENTS = (-2, -1, 1, 2)
RATINGS = (1, 2, 3, 4, 5)
SAID = 2  # words of the theme, and of the sentiment, in a text
FILLERS_PER_ITEM = (1, 3)
QUERY_START = (
    "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, "
    "or 5 without further explanation. review: "
)


class Ratings(Family):
    """A theme is an aspect; a value says how much the user makes of it; the context is the
    review's sentiment, -2, -1, 1 or 2, equally likely. Without noise the rating is

        clip(3 + offset(z1) + round(2 v / (C - 1) * sentiment), 1, 5),  offset = z1 mod 2

    (every other archetype is lenient, by one star). With probability `label_noise` the rating is
    drawn evenly from that one and its neighbours.
    """

    def __init__(self, options: SyntheticOptions, themes: list[dict[str, Any]]) -> None:
        super().__init__(options, themes)
        shape = (options.archetypes, options.choices, len(SENTIMENTS), len(RATINGS))
        self.joint = np.empty(shape)
        for archetype in range(options.archetypes):
            for value in range(options.choices):
                for context, sentiment in enumerate(SENTIMENTS):
                    rating = clean_rating(archetype, value, sentiment, options.choices)
                    self.joint[archetype, value, context] = _noisy(rating, options.label_noise)
        self.joint /= len(SENTIMENTS)
        self.gain = -np.abs(np.subtract.outer(RATINGS, RATINGS)).astype(float)
        self._theme = theme_index([theme["words"] for theme in themes])
        # All themes share the words of sentiment; each has them, for truth.json.
        self._sentiment = theme_index(themes[0]["sentiments"])

    @classmethod
    def invent(cls, options: SyntheticOptions, generator: Generator) -> list[dict[str, Any]]:
        shared = len(SENTIMENTS) * WORDS_PER_SENTIMENT
        words = invent_words(shared + options.themes * WORDS_PER_THEME, (), generator)
        sentiments = chunks(words[:shared], WORDS_PER_SENTIMENT)
        return [
            {"words": own, "sentiments": sentiments}
            for own in chunks(words[shared:], WORDS_PER_THEME)
        ]

    def write(self, theme: int, context: int, answer: int, generator: Generator) -> Written:
        words = draw(self.themes[theme]["words"], SAID, generator)
        words += draw(self.themes[theme]["sentiments"][context], SAID, generator)
        low, high = FILLERS_PER_ITEM
        text = shuffled(words, int(generator.integers(low, high + 1)), generator)
        rating = str(RATINGS[answer])
        return Written({"text": text, "score": rating}, QUERY_START + text, rating)

    def read(self, text: str) -> Reading:
        words = text.split()
        theme = next(self._theme[word] for word in words if word in self._theme)
        context = next(self._sentiment[word] for word in words if word in self._sentiment)
        return Reading(theme, context)

    def answers(self, reading: Reading) -> list[str]:
        return [str(rating) for rating in RATINGS]


def clean_rating(archetype: int, value: int, sentiment: int, choices: int) -> int:
    """The rating without noise (see `Ratings`); halves round away from 0."""
    strength = int(2.0 * value / (choices - 1) * abs(sentiment) + 0.5)
    offset = archetype % 2
    return int(np.clip(3 + offset + int(np.sign(sentiment)) * strength, RATINGS[0], RATINGS[-1]))


def _noisy(rating: int, noise: float) -> Floats:
    """[5]: p(rating given | rating without noise)."""
    near = np.abs(np.array(RATINGS) - rating) <= 1
    return (1.0 - noise) * (np.array(RATINGS) == rating) + noise * near / near.sum()

"""LaMP-1, 2M and 3: worlds whose answers are one of a few labels."""

from __future__ import annotations

from itertools import permutations

import numpy as np
from numpy.random import Generator

from tasks.lamp.definitions import LABELS, MOVIE_TAGS, question
from tasks.lamp.options import SyntheticOptions
from tasks.lamp.synthetic.family import (
    Family,
    Written,
    for_every_archetype,
    noisy_choice,
    plain_joint,
)
from tasks.lamp.synthetic.population import Floats
from tasks.lamp.synthetic.words import between, chunks, draw, invent_words, shuffled

# The wording of LaMP's real queries, so that the marker is found in them.
CITATION_QUERY = "For an author who has written the paper with the title "
MOVIE_QUERY = (
    "Which tag does this movie relate to among the following tags? Just answer with the tag name "
    f"without further explanation. tags: [{', '.join(MOVIE_TAGS)}] description: "
)
RATING_QUERY = (
    "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, "
    "or 5 without further explanation. review: "
)
SENTIMENTS = (-2, -1, 1, 2)
RATINGS = (1, 2, 3, 4, 5)


class Citations(Family):
    """LaMP-1. A theme is a topic with C schools; a value is the school that the user cites there. A
    reference is one word, that of its school in the topic, which a small model can tell.

    The cited reference is of school `value` with probability 1 - noise + noise / C, else of any
    other. The reference beside it is of one of the other C - 1 schools, evenly; their order is
    even. With the ordered pair (i, j) of schools as the context:

        p((i, j), "[1]" | v) = p(i | v) / (2 (C - 1))
        p((i, j), "[2]" | v) = p(j | v) / (2 (C - 1))

    A query's pair itself tells of v: the school that the user cites is mostly in it.
    """

    def __init__(self, options: SyntheticOptions, generator: Generator) -> None:
        size = 8 + options.choices
        words = chunks(invent_words(options.themes * size, (), generator), size)
        self.themes = [{"words": own[:8], "schools": own[8:]} for own in words]
        self.pairs = list(permutations(range(options.choices), 2))
        cited = noisy_choice(options.choices, options.label_noise)  # [v, school]
        table = np.stack([cited[:, list(pair)] for pair in self.pairs], axis=1)
        self.joint = for_every_archetype(table / (2 * (options.choices - 1)), options)
        self.gain = np.eye(len(LABELS))

    def write(self, theme: int, context: int, answer: int, generator: Generator) -> Written:
        known = self.themes[theme]
        title = shuffled(draw(known["words"], 3, generator), 1, generator)
        references = [known["schools"][school] for school in self.pairs[context]]
        fields = {
            "title": title,
            "abstract": shuffled(draw(known["words"], 3, generator), 3, generator),
            "citation": references[answer],
            "negative": references[1 - answer],
        }
        asked = CITATION_QUERY + question(title, *references)
        return Written(fields, asked, LABELS[answer], LABELS.__getitem__)


class Movies(Family):
    """LaMP-2M. A theme has 8 words and C tags; a value is a tag. A text has 3 to 5 of the theme's
    words, one of another theme's, and fillers."""

    def __init__(self, options: SyntheticOptions, generator: Generator) -> None:
        avoid = {word for tag in MOVIE_TAGS for word in tag.split()}
        words = chunks(invent_words(options.themes * 8, avoid, generator), 8)
        self.themes = [
            {"words": own, "tags": draw(MOVIE_TAGS, options.choices, generator)} for own in words
        ]
        self.joint = plain_joint(options)
        self.gain = np.eye(options.choices)

    def write(self, theme: int, context: int, answer: int, generator: Generator) -> Written:
        count, tags = between(3, 5, generator), self.themes[theme]["tags"]
        words = draw(self.themes[theme]["words"], count, generator)
        if len(self.themes) > 1:
            other = (theme + between(1, len(self.themes) - 1, generator)) % len(self.themes)
            words += draw(self.themes[other]["words"], 1, generator)
        text = shuffled(words, between(2, 4, generator), generator)
        fields = {"tag": tags[answer], "description": text}
        return Written(fields, MOVIE_QUERY + text, tags[answer], tags.__getitem__)


class Ratings(Family):
    """LaMP-3. A theme is an aspect; a value says how much the user makes of it; the context is the
    review's sentiment, -2, -1, 1 or 2, equally likely. Without noise the rating is

        clip(3 + offset(z1) + round(2 v / (C - 1) * sentiment), 1, 5),  offset = z1 mod 2

    (every other archetype is lenient, by one star). With probability `label_noise` the rating is
    drawn evenly from that one and its neighbours.
    """

    def __init__(self, options: SyntheticOptions, generator: Generator) -> None:
        # All themes share three words of each sentiment.
        shared = len(SENTIMENTS) * 3
        words = invent_words(shared + options.themes * 4, (), generator)
        sentiments = chunks(words[:shared], 3)
        self.themes = [
            {"words": own, "sentiments": sentiments} for own in chunks(words[shared:], 4)
        ]
        shape = (options.archetypes, options.choices, len(SENTIMENTS), len(RATINGS))
        self.joint = np.empty(shape)
        for archetype, value, context in np.ndindex(*shape[:3]):
            rating = clean_rating(archetype, value, SENTIMENTS[context], options.choices)
            self.joint[archetype, value, context] = _noisy(rating, options.label_noise)
        self.joint /= len(SENTIMENTS)
        self.gain = -np.abs(np.subtract.outer(RATINGS, RATINGS)).astype(float)

    def write(self, theme: int, context: int, answer: int, generator: Generator) -> Written:
        words = draw(self.themes[theme]["words"], 2, generator)
        words += draw(self.themes[theme]["sentiments"][context], 2, generator)
        text = shuffled(words, between(1, 3, generator), generator)
        labels = [str(rating) for rating in RATINGS]
        fields = {"text": text, "score": labels[answer]}
        return Written(fields, RATING_QUERY + text, labels[answer], labels.__getitem__)


def clean_rating(archetype: int, value: int, sentiment: int, choices: int) -> int:
    """The rating without noise (see `Ratings`); halves round away from 0."""
    strength = int(2.0 * value / (choices - 1) * abs(sentiment) + 0.5)
    offset = archetype % 2
    return int(np.clip(3 + offset + int(np.sign(sentiment)) * strength, RATINGS[0], RATINGS[-1]))


def _noisy(rating: int, noise: float) -> Floats:
    """[5]: p(rating given | rating without noise)."""
    near = np.abs(np.array(RATINGS) - rating) <= 1
    given: Floats = (1.0 - noise) * (np.array(RATINGS) == rating) + noise * near / near.sum()
    return given

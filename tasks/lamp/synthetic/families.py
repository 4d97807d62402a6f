"""The worlds of LaMP-1, 2M and 3, which answer by labels, and of 4 and 5, by titles."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations, product
from typing import ClassVar

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from tasks.lamp.definitions import LABELS, MOVIE_TAGS, question
from tasks.lamp.options import SyntheticOptions
from tasks.lamp.synthetic.family import (
    Family,
    Floats,
    Ints,
    Written,
    between,
    chunks,
    draw,
    invent_words,
    noisy_choice,
    shuffled,
)

# Worded as LaMP's real queries, in which a marker shows where the text begins.
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
# 0, 1, 2: the text's subject, action and place; 3, 4: the house words. Each has three of the five.
# With the first four, the likeliest template (greedy decoding) scores nearly as well as the best
# sequence. The others were chosen one by one, each with little in common with those before.
TEMPLATES = (
    (1, 4, 2), (4, 2, 1), (2, 1, 4), (0, 1, 3), (2, 3, 0), (3, 1, 2), (4, 1, 0), (0, 2, 4),
    (2, 0, 3), (3, 2, 1), (1, 3, 0), (0, 4, 2), (4, 0, 1), (1, 2, 4), (1, 0, 3),
)  # fmt: skip
SYMBOLS = 5
LONGEST = 8


class Citations(Family):
    """LaMP-1. A theme is a topic with C schools; a value is the school that the user cites there. A
    reference is one word, its school's in the topic: that is enough for a small model.

    The cited reference is of school `value` with probability 1 - noise + noise / C, else of any
    other. The reference beside it is of one of the other C - 1 schools, each as likely, and so is
    each order. With the ordered pair (i, j) of schools as the context:

        p((i, j), "[1]" | v) = p(i | v) / (2 (C - 1))
        p((i, j), "[2]" | v) = p(j | v) / (2 (C - 1))

    A query's pair alone says something about v: the school that the user cites is mostly in it.
    """

    def __init__(self, options: SyntheticOptions, generator: Generator) -> None:
        size = 8 + options.choices
        words = chunks(invent_words(options.themes * size, (), generator), size)
        self.themes = [{"words": theme[:8], "schools": theme[8:]} for theme in words]
        self.pairs = list(permutations(range(options.choices), 2))
        cited = noisy_choice(options)  # [v, school]
        table = np.stack([cited[:, list(pair)] for pair in self.pairs], axis=1)
        self.joint = table[None] / (2 * (options.choices - 1))
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
            {"words": theme, "tags": draw(MOVIE_TAGS, options.choices, generator)}
            for theme in words
        ]
        self.joint = noisy_choice(options)[None, :, None]
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
            {"words": theme, "sentiments": sentiments} for theme in chunks(words[shared:], 4)
        ]
        shape = (options.archetypes, options.choices, len(SENTIMENTS), len(RATINGS))
        self.joint = np.empty(shape)
        for archetype, value, context in np.ndindex(*shape[:3]):
            rating = clean_rating(archetype, value, SENTIMENTS[context], options.choices)
            same, near = np.array(RATINGS) == rating, np.abs(np.array(RATINGS) - rating) <= 1
            shares = (1.0 - options.label_noise) * same + options.label_noise * near / near.sum()
            self.joint[archetype, value, context] = shares
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


class Titles(Family):
    """A theme is a section with three words for each of three roles; a text has one of each, in
    any order, among fillers. A value is a template: the title is three words, some of the text's
    and a house word, in the template's order."""

    house_words: ClassVar[tuple[str, str]]
    text_field: ClassVar[str]
    query_start: ClassVar[str]

    def __init__(self, options: SyntheticOptions, generator: Generator) -> None:
        words = chunks(invent_words(options.themes * 9, self.house_words, generator), 9)
        self.themes = [{"roles": chunks(theme, 3)} for theme in words]
        self.joint = noisy_choice(options)[None, :, None]
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
        for sequence, row in zip(sequences.tolist(), scores, strict=True):
            kept.setdefault(row.tobytes(), (tuple(sequence), row))
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

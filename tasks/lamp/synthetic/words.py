"""Invented words and fillers: what the texts of the synthetic worlds are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from numpy.random import Generator

from tasks.errors import InputError

FILLER_TEXT = (
    "a the of and with about after before during near old young small great last first long quiet "
    "who when while where their one two more other between under over again still against into"
)
FILLERS = FILLER_TEXT.split()
CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
# Of 343,000 words of three syllables; up to here drawing different ones stays quick.
MAX_WORDS = 100_000

T = TypeVar("T")


def draw(values: Sequence[T], count: int, generator: Generator) -> list[T]:
    """`count` different ones of `values`, in random order."""
    return [values[int(index)] for index in generator.permutation(len(values))[:count]]


def between(low: int, high: int, generator: Generator) -> int:
    """A number from `low` to `high`, each as likely."""
    return int(generator.integers(low, high + 1))


def shuffled(words: Sequence[str], fillers: int, generator: Generator) -> str:
    """`words` and so many different fillers, in random order, as one text."""
    everything = [*words, *draw(FILLERS, fillers, generator)]
    return " ".join(draw(everything, len(everything), generator))


def invent_words(count: int, avoid: Iterable[str], generator: Generator) -> list[str]:
    """`count` different pronounceable words that are neither fillers nor among `avoid`.

    Raises InputError for more than MAX_WORDS.
    """
    if count > MAX_WORDS:
        raise InputError(
            f"synthetic.themes: this many themes and choices need {count} words; use options that "
            f"need at most {MAX_WORDS}"
        )
    words: dict[str, None] = {}
    taken = {*FILLERS, *avoid}
    while len(words) < count:
        consonants = generator.integers(len(CONSONANTS), size=3)
        vowels = generator.integers(len(VOWELS), size=3)
        word = "".join(CONSONANTS[c] + VOWELS[v] for c, v in zip(consonants, vowels, strict=True))
        if word not in taken:
            words[word] = None
    return list(words)


def chunks(words: Sequence[str], size: int) -> list[list[str]]:
    """`words` in lists of `size`."""
    return [list(words[start : start + size]) for start in range(0, len(words), size)]

"""What the synthetic world of each LaMP task defines: two tables, and texts of invented words.

All worlds share one population; a family says how a value shows in an item. The generator and the
optimum use the same two tables, so both are about the same distribution:

    joint [A or 1, C, contexts, answers]   p(c, y | first archetype, value), sums to 1 over c and y
    gain  [candidates, answers]            the task's score of a candidate when y is the answer
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from tasks.errors import InputError
from tasks.lamp.options import SyntheticOptions

FILLER_TEXT = (
    "a the of and with about after before during near old young small great last first long quiet "
    "who when while where their one two more other between under over again still against into"
)
FILLERS = FILLER_TEXT.split()
CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
# There are 343,000 words of three syllables. Up to here, drawing different ones stays quick.
MAX_WORDS = 100_000

T = TypeVar("T")
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Written:
    """An item as text: as `fields` of a profile item, and as a query's input and gold.

    candidate: from a row of the table `gain` to that answer to this text.
    """

    fields: dict[str, str]
    input: str
    gold: str
    candidate: Callable[[int], str]


class Family(ABC):
    """One LaMP task's tables and texts. themes: the vocabulary of each theme."""

    joint: Floats
    gain: Floats
    themes: list[dict[str, Any]]

    @abstractmethod
    def __init__(self, options: SyntheticOptions, generator: Generator) -> None:
        """Raises InputError for more themes than there are words."""

    @abstractmethod
    def write(self, theme: int, context: int, answer: int, generator: Generator) -> Written:
        """A text that shows theme and context, with its answer."""


def noisy_choice(options: SyntheticOptions) -> Floats:
    """[C, C]: p(y | v) = (1 - e) [y = v] + e / C, with e the label noise."""
    choices, noise = options.choices, options.label_noise
    return (1.0 - noise) * np.eye(choices) + noise / choices


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

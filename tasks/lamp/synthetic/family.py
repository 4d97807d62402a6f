"""What every LaMP task's synthetic world has to say of itself: tables, and texts for them.

All worlds share one population; a family says how a value shows in an item. Its two tables are
all that generator and optimum need, so both speak of the same distribution by construction:

    joint [A, C, contexts, answers]   p(c, y | first archetype, value), sums to 1 over c and y
    gain  [candidates, answers]       the task's score of saying a candidate when y is the answer
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.lamp.synthetic.population import Floats
from tasks.options import SyntheticOptions


@dataclass(frozen=True)
class Reading:
    """What a text says. words: the words an answer is made of, for tasks that need them."""

    theme: int
    context: int
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """An item as text: `fields` of a profile item, and the same as a query's input and gold."""

    fields: dict[str, str]
    input: str
    gold: str


class Family(ABC):
    """One LaMP task's texts and tables, for the themes of one world.

    themes: what `invent` gave, one JSON object per theme, as it stands in truth.json.
    """

    joint: Floats
    gain: Floats

    def __init__(self, options: SyntheticOptions, themes: list[dict[str, Any]]) -> None:
        self.options = options
        self.themes = themes

    @classmethod
    @abstractmethod
    def invent(
        cls, options: SyntheticOptions, generator: np.random.Generator
    ) -> list[dict[str, Any]]:
        """The vocabulary of each theme."""

    @abstractmethod
    def write(
        self, theme: int, context: int, answer: int, generator: np.random.Generator
    ) -> Written:
        """A text that says theme and context, in words of its own, with its answer."""

    @abstractmethod
    def read(self, text: str) -> Reading:
        """What a text says: of a profile item, as read by tasks/lamp/formats.py, or of a query."""

    @abstractmethod
    def answers(self, reading: Reading) -> list[str]:
        """The possible answers to a text, in the order of the tables."""

    def candidate(self, reading: Reading, number: int) -> str:
        """What saying candidate `number` is for this text; by default answers are candidates."""
        return self.answers(reading)[number]


def noisy_choice(choices: int, noise: float) -> Floats:
    """[C, C]: p(y | v) = (1 - noise) [y = v] + noise / C."""
    return (1.0 - noise) * np.eye(choices) + noise / choices


def for_every_archetype(table: Floats, archetypes: int) -> Floats:
    """A table [C, contexts, answers] that does not depend on the archetype, as [A, C, ..]."""
    return np.broadcast_to(table, (archetypes, *table.shape))

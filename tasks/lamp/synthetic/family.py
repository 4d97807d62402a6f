"""What the synthetic world of each LaMP task defines: two tables, and texts for them.

All worlds share one population; a family says how a value shows in an item. The generator and the
optimum use the same two tables, so both are about the same distribution:

    joint [A, C, contexts, answers]   p(c, y | first archetype, value), sums to 1 over c and y
    gain  [candidates, answers]       the task's score of saying a candidate when y is the answer
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from tasks.lamp.options import SyntheticOptions
from tasks.lamp.synthetic.population import Floats


@dataclass(frozen=True)
class Reading:
    """What a text says. words: the words an answer is made of, for tasks that need them."""

    theme: int
    context: int
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """An item as text: as `fields` of a profile item, and as a query's input and gold."""

    fields: dict[str, str]
    input: str
    gold: str


class Family(ABC):
    """One LaMP task's texts and tables, for the themes of one world.

    themes: one JSON object per theme, of `invent`, as in truth.json.
    """

    joint: Floats
    gain: Floats

    def __init__(self, options: SyntheticOptions, themes: list[dict[str, Any]]) -> None:
        self.options = options
        self.themes = themes

    @classmethod
    @abstractmethod
    def invent(cls, options: SyntheticOptions, generator: Generator) -> list[dict[str, Any]]:
        """The vocabulary of each theme."""

    @abstractmethod
    def write(self, theme: int, context: int, answer: int, generator: Generator) -> Written:
        """A text that shows theme and context, with its answer."""

    @abstractmethod
    def read(self, text: str) -> Reading:
        """What the text of a profile item or a query says."""

    @abstractmethod
    def answers(self, reading: Reading) -> list[str]:
        """The possible answers to a text, in the order of the tables."""

    def candidate(self, reading: Reading, number: int) -> str:
        """The answer that candidate `number` is for this text; by default a possible answer."""
        return self.answers(reading)[number]


def noisy_choice(choices: int, noise: float) -> Floats:
    """[C, C]: p(y | v) = (1 - noise) [y = v] + noise / C."""
    return (1.0 - noise) * np.eye(choices) + noise / choices


def plain_joint(options: SyntheticOptions) -> Floats:
    """[A, C, 1, C]: the joint table where the answer is the value but for noise, and no context."""
    table = noisy_choice(options.choices, options.label_noise)[:, None, :]
    return for_every_archetype(table, options.archetypes)


def for_every_archetype(table: Floats, archetypes: int) -> Floats:
    """A table [C, contexts, answers] that does not depend on the archetype, as [A, C, ..]."""
    return np.broadcast_to(table, (archetypes, *table.shape))

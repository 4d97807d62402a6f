"""What the synthetic world of each LaMP task defines: two tables, and texts for them.

All worlds share one population; a family says how a value shows in an item. The generator and the
optimum use the same two tables, so both are about the same distribution:

    joint [A, C, contexts, answers]   p(c, y | first archetype, value), sums to 1 over c and y
    gain  [candidates, answers]       the task's score of saying a candidate when y is the answer
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from tasks.lamp.options import SyntheticOptions
from tasks.lamp.synthetic.population import Floats


@dataclass(frozen=True)
class Written:
    """An item as text: as `fields` of a profile item, and as a query's input and gold.

    candidate: the answer to this text that candidate `number` of the table `gain` is.
    """

    fields: dict[str, str]
    input: str
    gold: str
    candidate: Callable[[int], str]


class Family(ABC):
    """One LaMP task's tables, and texts of the words that are invented for one world.

    themes: the vocabulary of each theme.
    """

    joint: Floats
    gain: Floats
    themes: list[dict[str, Any]]

    @abstractmethod
    def __init__(self, options: SyntheticOptions, generator: Generator) -> None:
        """Raises InputError for more themes than there are words."""

    @abstractmethod
    def write(self, theme: int, context: int, answer: int, generator: Generator) -> Written:
        """A text that shows theme and context, with its answer."""


def noisy_choice(choices: int, noise: float) -> Floats:
    """[C, C]: p(y | v) = (1 - noise) [y = v] + noise / C."""
    return (1.0 - noise) * np.eye(choices) + noise / choices


def plain_joint(options: SyntheticOptions) -> Floats:
    """[A, C, 1, C]: the joint table where the answer is the value but for noise, and no context."""
    table = noisy_choice(options.choices, options.label_noise)[:, None, :]
    return for_every_archetype(table, options)


def for_every_archetype(table: Floats, options: SyntheticOptions) -> Floats:
    """A table [C, contexts, answers] that does not depend on the archetype, as [A, C, ..]."""
    return np.broadcast_to(table, (options.archetypes, *table.shape))

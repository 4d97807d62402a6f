"""One synthetic world: its population, its users' items and queries, and the files of both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tasks.errors import InputError
from tasks.lamp.definitions import get_task
from tasks.lamp.options import SyntheticOptions
from tasks.lamp.prompts import question_text
from tasks.lamp.synthetic.citations import Citations
from tasks.lamp.synthetic.family import Family
from tasks.lamp.synthetic.movies import Movies
from tasks.lamp.synthetic.population import Floats, Ints, Population, Taste
from tasks.lamp.synthetic.ratings import Ratings
from tasks.lamp.synthetic.titles import Headlines, Papers

ROLE_FILES = {
    "base": "user_base_LLM.json",
    "anchor": "user_anchor_candidate.json",
    "few_shot": "user_few_shot.json",
}
TRUTH_FILE = "truth.json"
FAMILIES: dict[str, type[Family]] = {
    "LaMP-1": Citations,
    "LaMP-2M": Movies,
    "LaMP-3": Ratings,
    "LaMP-4": Headlines,
    "LaMP-5": Papers,
}
# Every random stream of a world has a key: the task, what for, whose. Other numbers, other worlds.
_TASK_NUMBERS = {"LaMP-1": 1, "LaMP-2M": 2, "LaMP-3": 3, "LaMP-4": 4, "LaMP-5": 5}
_ROLE_NUMBERS = {"base": 0, "anchor": 1, "few_shot": 2, "fresh": 3}
_VOCABULARY, _ARCHETYPES, _LATENT, _WORDS = 0, 1, 2, 3


@dataclass(frozen=True)
class Drawn:
    """Items without words: theme, context and answer (numbers) of each, [N]."""

    themes: Ints
    contexts: Ints
    answers: Ints


class World:
    """The population and the texts of one LaMP task, options and seed.

    Raises InputError for a task without a synthetic world, and for more themes than there are
    words.
    """

    def __init__(self, lamp_task: str, options: SyntheticOptions, seed: int) -> None:
        if lamp_task not in FAMILIES:
            raise InputError(
                f"data=synthetic has no {lamp_task!r}: use one of {', '.join(FAMILIES)}, or give "
                "data=<folder>"
            )
        self.lamp_task = lamp_task
        self.options = options
        self.seed = seed
        family = FAMILIES[lamp_task]
        self.family = family(options, family.invent(options, self._stream(_VOCABULARY)))
        shape = (options.archetypes, options.themes)
        self.population = Population(
            self._stream(_ARCHETYPES).integers(options.choices, size=shape),
            options.choices,
            options.mixture_min,
            options.quirk,
        )

    def _stream(self, *about: int) -> np.random.Generator:
        key = (_TASK_NUMBERS[self.lamp_task], *about)
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    @cached_property
    def _cumulated(self) -> Floats:
        """[A, C, contexts * answers]: cumulated probabilities, to draw items from."""
        table = self.family.joint
        sums = table.reshape(*table.shape[:2], -1).cumsum(axis=-1)
        return sums / sums[..., -1:]

    def draw(self, role: str, index: int) -> tuple[Taste, Drawn, Drawn]:
        """User `index` of a role (or `fresh`, of none): taste, items, queries."""
        options = self.options
        generator = self._stream(_LATENT, _ROLE_NUMBERS[role], index)
        taste = self.population.draw_taste(generator)
        queries = 0
        if role in ("base", "anchor"):
            items = int(generator.integers(options.items_min, options.items_max + 1))
        else:
            items, queries = options.few_shot_items, options.queries
        return taste, self.items(taste, items, generator), self.items(taste, queries, generator)

    def items(self, taste: Taste, count: int, generator: np.random.Generator) -> Drawn:
        """`count` independent items of one user."""
        themes = generator.integers(self.options.themes, size=count)
        outcomes = [
            np.searchsorted(self._cumulated[taste.first, taste.values[theme]], number, "right")
            for theme, number in zip(themes, generator.random(count), strict=True)
        ]
        answers = self.family.joint.shape[-1]
        contexts, answered = np.divmod(np.array(outcomes, dtype=np.int64), answers)
        return Drawn(themes, contexts, answered)

    def record(self, role: str, index: int, truth: dict[str, Any]) -> dict[str, Any]:
        """One record of a user file; the truth about the user is added to `truth`."""
        user_id = f"{role}-{index:05d}"
        taste, items, queries = self.draw(role, index)
        words = self._stream(_WORDS, _ROLE_NUMBERS[role], index)
        taken: set[str] = set()
        truth["users"][user_id] = {
            "role": role,
            "archetypes": [taste.first, taste.second],
            "mixture": taste.mixture,
            "values": taste.values.tolist(),
        }
        profile, query = [], []
        for number, (_, _, written) in enumerate(self._written(items, words, taken)):
            profile.append({"id": f"{user_id}-item-{number:04d}", **written.fields})
        for number, (theme, context, written) in enumerate(self._written(queries, words, taken)):
            query_id = f"{user_id}-query-{number:04d}"
            query.append({"id": query_id, "input": written.input, "gold": written.gold})
            truth["queries"][query_id] = {"user_id": user_id, "theme": theme, "context": context}
        return {"user_id": user_id, "profile": profile, "query": query}

    def _written(
        self, drawn: Drawn, words: np.random.Generator, taken: set[str]
    ) -> Iterator[tuple[int, int, Any]]:
        """The items in words; words are drawn until the text is new to the user."""
        task = get_task(self.lamp_task)
        for theme, context, answer in zip(
            drawn.themes.tolist(), drawn.contexts.tolist(), drawn.answers.tolist(), strict=True
        ):
            subject = None
            while subject is None or subject in taken:
                written = self.family.write(theme, context, answer, words)
                subject = task.subject(question_text(written.input, task))
            taken.add(subject)
            yield theme, context, written


def write_synthetic(
    folder: Path, lamp_task: str, options: SyntheticOptions, seed: int
) -> dict[str, Any]:
    """Write base, anchor and few-shot users of one synthetic world, and the truth about them.

    The same task, options and seed give the same bytes. More users leave the others as they were.
    Returns the content of truth.json: `lamp_task`, `seed`, `options`; `themes`, the vocabulary of
    each; `archetypes` [archetype][theme] -> value; `users` {user_id: {role, archetypes [first,
    second], mixture, values [theme] -> value}}; `queries` {query_id: {user_id, theme, context}}.
    Raises InputError for a task that has no synthetic world, or too many themes.
    """
    world = World(lamp_task, options, seed)
    counts = {
        "base": options.base_users,
        "anchor": options.anchor_candidates,
        "few_shot": options.few_shot_users,
    }
    truth: dict[str, Any] = {
        "lamp_task": lamp_task,
        "seed": seed,
        "options": options.model_dump(),
        "themes": world.family.themes,
        "archetypes": world.population.archetypes.tolist(),
        "users": {},
        "queries": {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for role, file_name in ROLE_FILES.items():
        users = [world.record(role, index, truth) for index in range(counts[role])]
        _write_json(folder / file_name, users)
    _write_json(folder / TRUTH_FILE, truth)
    return truth


def _write_json(path: Path, content: Any) -> None:
    """Bytes, not text: the same on every system."""
    path.write_bytes((json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode("utf-8"))

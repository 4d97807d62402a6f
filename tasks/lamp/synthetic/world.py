"""One synthetic world: its population, its users' items and queries, and the files of both.

A world has S themes, A archetypes and C choices. An archetype has one value 0..C-1 per theme. A
user has a first archetype z1, a second z2 != z1 (every ordered pair equally likely), a mixture
m ~ U[mixture_min, 1], and per theme a value v, drawn once:

    p(v | z1, z2, m) = quirk / C + (1 - quirk) (m [v = a(z1)] + (1 - m) [v = a(z2)])

An item has a uniform theme; its context c (what the text says beside the theme) and its answer y
follow a table p(c, y | z1, v) of the LaMP task (`family.Family.joint`).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator

from tasks.lamp.definitions import get_task
from tasks.lamp.folders import ROLE_FILE_NAMES
from tasks.lamp.options import SyntheticOptions
from tasks.lamp.prompts import question_text
from tasks.lamp.synthetic.families import Citations, Headlines, Movies, Papers, Ratings
from tasks.lamp.synthetic.family import Family, Ints, Written, between

FAMILIES: dict[str, type[Family]] = {
    "LaMP-1": Citations,
    "LaMP-2M": Movies,
    "LaMP-3": Ratings,
    "LaMP-4": Headlines,
    "LaMP-5": Papers,
}
# Each random stream of a world has a key: the task, the purpose, the user, as places in these
# tuples. With other places, all worlds change. `fresh` users are in no file.
_TASKS, _ROLES = (*FAMILIES,), (*ROLE_FILE_NAMES, "fresh")
_VOCABULARY, _ARCHETYPES, _LATENT, _WORDS = range(4)


@dataclass(frozen=True)
class Taste:
    """The truth about one user. values: [S], the user's value per theme."""

    first: int
    second: int
    mixture: float
    values: Ints


@dataclass(frozen=True)
class User:
    """items, queries [N, 3]: theme, context and answer of each; profile, asked: these in words."""

    id: str
    taste: Taste
    items: Ints
    queries: Ints
    profile: dict[str, Written]
    asked: dict[str, Written]


class World:
    """The population and the texts of one LaMP task, options and seed.

    archetypes: [A, S] values. joint: as `Family.joint`, for every archetype. counts: users by role.
    Raises InputError for more themes than there are words.
    """

    def __init__(self, lamp_task: str, options: SyntheticOptions, seed: int) -> None:
        self.lamp_task, self.options, self.seed = lamp_task, options, seed
        self.family = FAMILIES[lamp_task](options, self._stream(_VOCABULARY))
        joint, count = self.family.joint, options.archetypes
        self.joint = np.broadcast_to(joint, (count, *joint.shape[1:]))
        values = self._stream(_ARCHETYPES).integers(options.choices, size=(count, options.themes))
        self.archetypes: Ints = values
        counts = (options.base_users, options.anchor_candidates, options.few_shot_users)
        self.counts = dict(zip(ROLE_FILE_NAMES, counts, strict=True))
        # [A, C, contexts * answers]: cumulated probabilities, to draw items from.
        sums = self.joint.reshape(options.archetypes, options.choices, -1).cumsum(axis=-1)
        self._cumulated = sums / sums[..., -1:]

    def draw(self, role: str, index: int) -> tuple[Taste, Ints, Ints]:
        """User `index` of a role, without words: taste, items, queries (as in `User`)."""
        options = self.options
        taste, generator = self._taste(role, index)
        count, queries = options.few_shot_items, options.queries
        if role in ("base", "anchor"):
            count, queries = between(options.items_min, options.items_max, generator), 0
        return taste, self.items(taste, count, generator), self.items(taste, queries, generator)

    def _taste(self, role: str, index: int) -> tuple[Taste, Generator]:
        """A user's taste, and the generator of what is drawn after it."""
        options, generator = self.options, self._stream(_LATENT, _ROLES.index(role), index)
        first, second = (int(z) for z in generator.permutation(options.archetypes)[:2])
        mixture = float(generator.uniform(options.mixture_min, 1.0))
        quirky = generator.random(options.themes) < options.quirk
        by_first = generator.random(options.themes) < mixture
        follows = np.where(by_first, self.archetypes[first], self.archetypes[second])
        free = generator.integers(options.choices, size=options.themes)
        return Taste(first, second, mixture, np.where(quirky, free, follows)), generator

    def items(self, taste: Taste, count: int, generator: Generator) -> Ints:
        """`count` independent items of one user: theme, context and answer of each, [count, 3]."""
        themes = generator.integers(self.options.themes, size=count)
        cumulated = self._cumulated[taste.first, taste.values[themes]]
        outcomes = (cumulated <= generator.random(count)[:, None]).sum(axis=1)
        contexts, answers = np.divmod(outcomes, self.joint.shape[-1])
        return np.stack([themes, contexts, answers], axis=1)

    def user(self, role: str, index: int) -> User:
        """User `index` of a role, with words."""
        taste, items, queries = self.draw(role, index)
        generator = self._stream(_WORDS, _ROLES.index(role), index)
        name, taken = user_id(role, index), set[str]()
        profile = self._in_words(f"{name}-item", items, generator, taken)
        asked = self._in_words(f"{name}-query", queries, generator, taken)
        return User(name, taste, items, queries, profile, asked)

    def users(self, role: str) -> Iterator[User]:
        """All users of a role."""
        return (self.user(role, index) for index in range(self.counts[role]))

    def tastes(self) -> dict[str, Taste]:
        """The truth about all users, by id."""
        everybody = [(role, n) for role, count in self.counts.items() for n in range(count)]
        return {user_id(role, index): self._taste(role, index)[0] for role, index in everybody}

    def write(self, folder: Path) -> None:
        """Write base, anchor and few-shot users as LaMP's user files.

        The same task, options and seed give the same bytes. More users leave the others alone.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for role, (name, *_) in ROLE_FILE_NAMES.items():
            users = [
                {
                    "user_id": user.id,
                    "profile": [{"id": n, **item.fields} for n, item in user.profile.items()],
                    "query": [
                        {"id": n, "input": q.input, "gold": q.gold} for n, q in user.asked.items()
                    ],
                }
                for user in self.users(role)
            ]
            # Bytes, not text: the same on every system.
            content = json.dumps(users, ensure_ascii=False, indent=1) + "\n"
            (folder / f"{name}.json").write_bytes(content.encode("utf-8"))

    def _stream(self, *about: int) -> Generator:
        key = (1 + _TASKS.index(self.lamp_task), *about)
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def _in_words(
        self, name: str, items: Ints, generator: Generator, taken: set[str]
    ) -> dict[str, Written]:
        """The items in words, by id; words are drawn until the text is new to the user."""
        task, in_words = get_task(self.lamp_task), {}
        for number, (theme, context, answer) in enumerate(items.tolist()):
            subject = None
            while subject is None or subject in taken:
                written = self.family.write(theme, context, answer, generator)
                subject = task.subject(question_text(written.input, task))
            taken.add(subject)
            in_words[f"{name}-{number:04d}"] = written
        return in_words


def user_id(role: str, index: int) -> str:
    return f"{role}-{index:05d}"

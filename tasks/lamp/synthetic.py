"""Synthetic LaMP-2M users whose taste is known, so that personalisation can be measured.

Themes stand for films of one sort: each has its own words and a few plausible tags. Archetypes
are ways of tagging: each picks one plausible tag per theme. A user mixes two archetypes, so what
one user needs is spread over several anchors, which is what a merged LoRA has to find again.

    write_synthetic(Path("data"), SyntheticOptions(), seed=0)

writes the three user files that tasks/lamp/formats.py reads, and truth.json beside them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tasks.config import SyntheticOptions
from tasks.errors import InputError
from tasks.lamp.definitions import MOVIE_TAGS

ROLE_FILES = {
    "base": "user_base_LLM.json",
    "anchor": "user_anchor_candidate.json",
    "few_shot": "user_few_shot.json",
}
TRUTH_FILE = "truth.json"

WORDS_PER_THEME = 8
THEME_WORDS_PER_ITEM = (3, 5)
FILLERS_PER_ITEM = (2, 4)
MAX_THEMES = 5000

T = TypeVar("T")

# The wording of LaMP-2M's real queries, so that the marker is found in them.
QUERY_START = (
    "Which tag does this movie relate to among the following tags? Just answer with the tag name "
    f"without further explanation. tags: [{', '.join(MOVIE_TAGS)}] description: "
)
FILLER_TEXT = (
    "a the of and with about after before during near old young small great last first long quiet "
    "who when while where their one two more other between under over again still against into"
)
FILLERS = FILLER_TEXT.split()
CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"


def write_synthetic(folder: Path, options: SyntheticOptions, seed: int) -> dict[str, Any]:
    """Write base, anchor and few-shot users of one synthetic world, and the truth about them.

    folder is created if it is not there. The same options and seed give the same bytes. A user
    depends on the seed, its role and its number only: asking for more users leaves the others
    as they were.

    Returns what truth.json holds:
    `themes` [{words, tags}]; `archetypes` [archetype][theme] -> tag; `users` {user_id: {role,
    archetypes [first, second], mixture, tags [theme] -> tag}}; `queries` {query_id: {user_id,
    theme, tag}}, where tag is the user's own, before label noise.
    Raises InputError when more themes are asked for than there are words.
    """
    if options.themes > MAX_THEMES:
        raise InputError(f"synthetic.themes {options.themes}: use at most {MAX_THEMES}")
    world = _World(options, seed)
    counts = {
        "base": options.base_users,
        "anchor": options.anchor_candidates,
        "few_shot": options.few_shot_users,
    }
    truth: dict[str, Any] = {
        "seed": seed,
        "options": options.model_dump(),
        "themes": world.themes,
        "archetypes": world.archetypes,
        "users": {},
        "queries": {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for role, file_name in ROLE_FILES.items():
        users = [world.user(role, index, truth) for index in range(counts[role])]
        _write_json(folder / file_name, users)
    _write_json(folder / TRUTH_FILE, truth)
    return truth


class _World:
    """Themes and archetypes of one seed, and the users drawn from them."""

    def __init__(self, options: SyntheticOptions, seed: int) -> None:
        self.options = options
        self.seed = seed
        generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
        words = _invent_words(options.themes * WORDS_PER_THEME, generator)
        self.themes: list[dict[str, list[str]]] = [
            {
                "words": words[theme * WORDS_PER_THEME : (theme + 1) * WORDS_PER_THEME],
                "tags": _draw(list(MOVIE_TAGS), options.tags_per_theme, generator),
            }
            for theme in range(options.themes)
        ]
        self.archetypes: list[list[str]] = [
            [_draw(theme["tags"], 1, generator)[0] for theme in self.themes]
            for _ in range(options.archetypes)
        ]

    def user(self, role: str, index: int, truth: dict[str, Any]) -> dict[str, Any]:
        """One record of a user file; what is true of the user is added to `truth`."""
        # One stream per user: a spawn key, not a shared generator, keeps users independent.
        key = (1, list(ROLE_FILES).index(role), index)
        generator = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))
        user_id = f"{role}-{index:05d}"
        first, second = _draw(list(range(self.options.archetypes)), 2, generator)
        mixture = float(generator.uniform(self.options.mixture_min, 1.0))
        tags = [self._taste(theme, first, second, mixture, generator) for theme in self._indices()]
        truth["users"][user_id] = {
            "role": role,
            "archetypes": [first, second],
            "mixture": mixture,
            "tags": tags,
        }
        few_shot = role == "few_shot"
        if few_shot:
            items = self.options.few_shot_items
        else:
            items = int(generator.integers(self.options.items_min, self.options.items_max + 1))
        profile = []
        for number in range(items):
            _, description, tag = self._item(tags, generator)
            item_id = f"{user_id}-item-{number:04d}"
            profile.append({"id": item_id, "tag": tag, "description": description})
        taken = {item["description"] for item in profile}
        query = []
        for number in range(self.options.queries if few_shot else 0):
            theme, description, tag = self._item(tags, generator)
            while description in taken:
                theme, description, tag = self._item(tags, generator)
            taken.add(description)
            query_id = f"{user_id}-query-{number:04d}"
            query.append({"id": query_id, "input": QUERY_START + description, "gold": tag})
            truth["queries"][query_id] = {"user_id": user_id, "theme": theme, "tag": tags[theme]}
        return {"user_id": user_id, "profile": profile, "query": query}

    def _indices(self) -> range:
        return range(self.options.themes)

    def _taste(
        self, theme: int, first: int, second: int, mixture: float, generator: np.random.Generator
    ) -> str:
        """The tag one user gives to one theme, drawn once."""
        if generator.random() < self.options.quirk:
            return _draw(self.themes[theme]["tags"], 1, generator)[0]
        archetype = first if generator.random() < mixture else second
        return self.archetypes[archetype][theme]

    def _item(self, tags: list[str], generator: np.random.Generator) -> tuple[int, str, str]:
        """One item: its theme, its description and the tag it carries (with label noise)."""
        theme = int(generator.integers(self.options.themes))
        low, high = THEME_WORDS_PER_ITEM
        words = _draw(
            self.themes[theme]["words"], int(generator.integers(low, high + 1)), generator
        )
        if self.options.themes > 1:
            other = (theme + int(generator.integers(1, self.options.themes))) % self.options.themes
            words += _draw(self.themes[other]["words"], 1, generator)
        low, high = FILLERS_PER_ITEM
        words += _draw(FILLERS, int(generator.integers(low, high + 1)), generator)
        description = " ".join(_draw(words, len(words), generator))
        if generator.random() < self.options.label_noise:
            return theme, description, _draw(self.themes[theme]["tags"], 1, generator)[0]
        return theme, description, tags[theme]


def _draw(values: list[T], count: int, generator: np.random.Generator) -> list[T]:
    """`count` different ones of `values`, in random order."""
    return [values[int(index)] for index in generator.permutation(len(values))[:count]]


def _invent_words(count: int, generator: np.random.Generator) -> list[str]:
    """`count` different pronounceable words that are neither fillers nor tags."""
    words: dict[str, None] = {}
    avoid = set(FILLERS) | {word for tag in MOVIE_TAGS for word in tag.split()}
    while len(words) < count:
        syllables = [
            CONSONANTS[int(generator.integers(len(CONSONANTS)))]
            + VOWELS[int(generator.integers(len(VOWELS)))]
            for _ in range(3)
        ]
        word = "".join(syllables)
        if word not in avoid:
            words[word] = None
    return list(words)


def _write_json(path: Path, content: Any) -> None:
    """Bytes, not text: the same on every system."""
    path.write_bytes((json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode("utf-8"))

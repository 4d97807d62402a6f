"""Small synthetic worlds, and an independent account of what their items say."""

from __future__ import annotations

import re
from itertools import chain, permutations, product

import numpy as np
from numpy.polynomial import Polynomial

from tasks.lamp.definitions import LABELS
from tasks.lamp.options import SyntheticOptions
from tasks.lamp.synthetic import World
from tasks.lamp.synthetic.families import TEMPLATES

TASKS = ["LaMP-1", "LaMP-2M", "LaMP-3", "LaMP-4", "LaMP-5"]
SMALL = SyntheticOptions(
    few_shot_items=10,
    base_users=5,
    anchor_candidates=4,
    few_shot_users=20,
    items_min=11,
    items_max=14,
)


def by_hand(
    lamp_task: str, options: SyntheticOptions, first: int, value: int, context: int, answer: int
) -> float:
    """p(context, answer | first archetype, value), said again from docs/worlds.md."""
    choices, noise = options.choices, options.label_noise
    if lamp_task == "LaMP-1":
        school = list(permutations(range(choices), 2))[context][answer]
        cited = noise / choices + (1 - noise if school == value else 0)
        return cited / (choices - 1) / 2
    if lamp_task == "LaMP-3":
        sentiment = (-2, -1, 1, 2)[context]
        # Round half away from zero, written with exact integers.
        strength = (4 * value * abs(sentiment) + choices - 1) // (2 * (choices - 1))
        rating = 3 + first % 2 + (strength if sentiment > 0 else -strength)
        rating = min(5, max(1, rating))
        near = [r for r in range(1, 6) if abs(r - rating) <= 1]
        given = answer + 1
        return ((1 - noise) * (given == rating) + noise * (given in near) / len(near)) / 4
    return noise / choices + (1 - noise if answer == value else 0)


def enumerated(
    world: World,
    items: list[tuple[int, int, int]],
    theme: int,
) -> np.ndarray:
    """[A, C]: p(z1, value of `theme` | items), over all pairs, all values of all themes at once,
    and the mixture by exact integration of a polynomial."""
    archetypes, options = world.archetypes, world.options
    count, themes = archetypes.shape
    choices, quirk, low = options.choices, options.quirk, options.mixture_min
    result = np.zeros((count, choices))
    for first, second in permutations(range(count), 2):
        for values in product(range(choices), repeat=themes):
            density = Polynomial([1.0])
            for s, v in enumerate(values):
                is_first = float(v == archetypes[first, s])
                is_second = float(v == archetypes[second, s])
                density *= Polynomial(
                    [
                        quirk / choices + (1 - quirk) * is_second,
                        (1 - quirk) * (is_first - is_second),
                    ]
                )
            integral = density.integ()
            mass = (integral(1.0) - integral(low)) / (1 - low) if low < 1 else density(1.0)
            for s, context, answer in items:
                mass *= by_hand(world.lamp_task, options, first, values[s], context, answer)
            result[first, values[theme]] += mass
    return result / result.sum()


def read_text(world: World, text: str) -> tuple[int, int, list[str]]:
    """Theme and context that the words of an item or a query say, and its possible answers."""
    themes, task = world.family.themes, world.lamp_task
    words = text.split()
    if task == "LaMP-1":
        found = re.search(r'\[1\]: "(.*)" \[2\]: "(.*)"$', text)
        assert found
        theme = theme_of(found[1], [theme["schools"] for theme in themes])
        schools = tuple(themes[theme]["schools"].index(reference) for reference in found.groups())
        pairs = list(permutations(range(world.options.choices), 2))
        return theme, pairs.index(schools), list(LABELS)
    if task == "LaMP-2M":
        own = [len({*words} & {*theme["words"]}) for theme in themes]
        return int(np.argmax(own)), 0, themes[int(np.argmax(own))]["tags"]
    if task == "LaMP-3":
        known = [theme["words"] for theme in themes]
        theme = next(theme_of(word, known) for word in words if word in {*chain(*known)})
        said = [len({*words} & {*own}) for own in themes[0]["sentiments"]]
        return theme, int(np.argmax(said)), [str(rating) for rating in range(1, 6)]
    known = [[*chain(*theme["roles"])] for theme in themes]
    theme = next(theme_of(word, known) for word in words if word in {*chain(*known)})
    roles = [next(word for word in words if word in own) for own in themes[theme]["roles"]]
    everything = [*roles, *world.family.house_words]  # type: ignore[attr-defined]
    chosen = TEMPLATES[: world.options.choices]
    return theme, 0, [" ".join(everything[symbol] for symbol in one) for one in chosen]


def theme_of(word: str, themes: list[list[str]]) -> int:
    """The theme that has the word."""
    return next(number for number, words in enumerate(themes) if word in words)


def read_item(world: World, item: dict[str, str]) -> tuple[int, int, int]:
    """Theme, context and answer (numbers) of a profile item {text, answer}."""
    theme, context, answers = read_text(world, item["text"])
    return theme, context, answers.index(item["answer"])

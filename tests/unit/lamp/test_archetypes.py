"""What the ladder takes for true of a generated world (tests/benchmarks/archetypes.py)."""

import numpy as np
import pytest

from tasks.config.run import resolve
from tasks.lamp.synthetic import World
from tests.benchmarks.archetypes import answered_by, shares

SMALL = {"anchor_candidates": 3, "few_shot_users": 3, "few_shot_items": 8, "archetypes": 4}


@pytest.mark.parametrize("lamp_task", ["LaMP-1", "LaMP-3"])
def test_without_items_every_archetype_has_the_same_share(lamp_task: str) -> None:
    """By symmetry: every ordered pair is equally likely."""
    options = resolve({"synthetic": SMALL}).synthetic
    world = World(lamp_task, options, 0)
    assert shares(world, world.user("few_shot", 0), 0) == pytest.approx([1 / 4] * 4)


def test_many_items_tell_the_users_own_archetypes() -> None:
    """Without quirks and noise, the two that a user mixes have nearly all."""
    given = SMALL | {"few_shot_items": 200, "quirk": 0.0, "label_noise": 0.0, "choices": 5}
    world = World("LaMP-2M", resolve({"synthetic": given}).synthetic, 0)
    for user in world.users("few_shot"):
        found = shares(world, user, None)
        both = [user.taste.first, user.taste.second]
        assert found.sum() == pytest.approx(1.0)
        assert found[both].sum() > 0.9
        assert found[user.taste.first] == pytest.approx(user.taste.mixture, abs=0.2)


def test_an_item_is_of_the_archetype_whose_value_it_shows() -> None:
    world = World("LaMP-2M", resolve({"synthetic": SMALL | {"quirk": 0.0}}).synthetic, 0)
    user = world.user("anchor", 0)
    found = answered_by(world, user)
    for name, theme in zip(user.profile, user.items[:, 0], strict=True):
        archetype = found[name]
        assert archetype in (user.taste.first, user.taste.second)
        assert world.archetypes[archetype, theme] == user.taste.values[theme]
    assert len(np.unique([*found.values()])) == 2

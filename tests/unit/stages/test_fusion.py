"""The stage that gives every few-shot user a recipe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tasks.config.options import FusionOptions
from tasks.errors import InputError
from tasks.fusion import VectorEvidence, fusion
from tasks.recipes import read_recipes
from tasks.results.models import Recipes
from tests.unit.stages.vectors import bank_of, embedded

pytestmark = pytest.mark.usefixtures("where")


def fused(cosines: list[float], **options: Any) -> Recipes:
    """The stage, for the users alike and u of two anchors of these cosines with u."""
    vectors = embedded(
        anchor={
            name: [one, (1 - one * one) ** 0.5] for name, one in zip("ab", cosines, strict=True)
        },
        few_shot={"alike": [0.0, 1.0], "u": [1.0, 0.0]},
    )
    chosen = FusionOptions(**({"top_m": 2, "weights": "cosine"} | options))
    bank = bank_of({"a": ["a"], "b": ["b"]})
    return fusion(chosen, vectors, bank, None, seed=0)


@pytest.mark.parametrize(
    ("cosines", "told"), [([0.8, -0.1], "0.8, -0.1"), ([0.25, -0.25], "0.25, -0.25")]
)
def test_published_refuses_what_its_merger_refuses(cosines: list[float], told: str) -> None:
    """0.8 / 0.7 > 1: "Alpha must be between 0 and 1" there; and a sum of 0 has no shares."""
    with pytest.raises(InputError) as refused:
        fused(cosines, order="published")
    message = str(refused.value)
    assert f"user u has the similarities {told}, whose shares" in message
    assert "use order=right" in message
    assert "\n" not in message
    for options in ({}, {"order": "published", "weights": "softmax"}):
        assert fused(cosines, **options).users == 2


def test_published_weights_reach_the_recipe() -> None:
    recipe = read_recipes(fused([-0.1, -0.2], order="published"))["u"]
    assert recipe.anchors == ("a", "b")
    assert recipe.weights == pytest.approx([2 / 3, 1 / 3], abs=1e-6)


def test_vectors_are_half_of_the_evidence() -> None:
    """By hand: two groups of candidates along one axis, whose means are at +2 and -2 of it.

    Of a user at .5 with 4 items these say 4 (1 - 2) and 4 (-1 - 2), beside the 3 and 1 of answers.
    """
    points = np.array([[1.0, 0.0], [3.0, 0.0], [-1.0, 0.0], [-3.0, 0.0]])
    evidence, users = np.array([[3.0, 1.0]]), np.array([[0.5, 7.0]])
    ids = ["a", "b", "c", "d"]
    both = VectorEvidence(bank_of({"ab": ["a", "b"], "cd": ["c", "d"]}), ids, points, seed=0)
    assert both(evidence, users, [4]).tolist() == [[(3 - 4) / 2, (1 - 12) / 2]]
    # Of an adapter that was given nobody is known.
    given = VectorEvidence(bank_of({"ab": ["a", "b"], "x": []}), ids, points, seed=0)
    assert given(evidence, users, [4]).tolist() == [[3.0, 1.0]]

"""Recipes: which anchors, which weights. All numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.config.options import FusionOptions
from tasks.method.weights import recipes, search
from tests.benchmarks.search import recipe_alone, unit_vectors

MEMBERS = ["a", "b", "c", "d"]


def made(similarities: list[float], **options: Any) -> dict[str, Any]:
    chosen, values, weights = recipes(np.array([similarities]), FusionOptions(**options))
    anchors = [MEMBERS[number] for number in chosen[0]]
    return {
        "anchors": anchors,
        "similarities": values[0].tolist(),
        "weights": weights[0].tolist(),
    }


def test_the_more_similar_anchor_weighs_more() -> None:
    """docs/method.md, stage 2: w_i = s_i / sum(s). 0.9 / (0.9 + 0.88) = 0.50562."""
    got = made([0.1, 0.88, -0.3, 0.9], top_m=2)
    assert got["anchors"] == ["d", "b"]
    assert got["similarities"] == [0.9, 0.88]
    assert got["weights"] == pytest.approx([0.9 / 1.78, 0.88 / 1.78], abs=1e-12)


def test_published_hands_them_out_the_wrong_way_round() -> None:
    """alpha = s1 / (s1 + s2) goes to a merger that weighs the first adapter by 1 - alpha."""
    got = made([0.2, 0.8], top_m=2, order="published")
    assert got["anchors"] == ["b", "a"]
    assert got["similarities"] == [0.8, 0.2]
    alpha = 0.8 / (0.8 + 0.2)
    assert got["weights"] == pytest.approx([1 - alpha, alpha])


def test_published_leaves_negative_similarities_as_they_are() -> None:
    """alpha = -0.1 / (-0.1 - 0.2) = 1/3; the first adapter weighs 1 - alpha."""
    got = made([-0.2, -0.1], top_m=2, order="published")
    assert got["anchors"] == ["b", "a"]
    assert got["weights"] == pytest.approx([2 / 3, 1 / 3], abs=1e-12)


def test_negative_similarities_count_as_nothing() -> None:
    got = made([-0.5, 0.6, 0.2, -0.1], top_m=3)
    assert got["anchors"] == ["b", "c", "d"]
    assert got["weights"] == pytest.approx([0.75, 0.25, 0.0])


@pytest.mark.parametrize("similarities", [[-0.5, -0.1, -0.3], [0.0, 0.0, 0.0], [-0.2, 0.0, -0.1]])
def test_a_user_like_no_anchor_gets_equal_weights(similarities: list[float]) -> None:
    assert made(similarities, top_m=2)["weights"] == [0.5, 0.5]


def test_softmax_by_hand() -> None:
    """exp(0.5 / 0.1) and exp(0.3 / 0.1): 1 / (1 + e^-2) = 0.8808."""
    got = made([0.3, 0.5, -0.9], top_m=2, weights="softmax", temperature=0.1)
    first = 1 / (1 + math.exp(-2))
    assert got["anchors"] == ["b", "a"]
    assert got["weights"] == pytest.approx([first, 1 - first])
    got = made([-0.3, -0.5], top_m=2, weights="softmax", temperature=0.2)
    first = 1 / (1 + math.exp(-1))
    assert got["weights"] == pytest.approx([first, 1 - first])


def test_softmax_at_a_tiny_temperature_does_not_overflow() -> None:
    got = made([1.0, 0.9], weights="softmax", temperature=1e-4)
    assert got["weights"] == pytest.approx([1.0, 0.0])


def test_more_asked_than_there_are() -> None:
    got = made([0.1, 0.3], top_m=50)
    assert got["anchors"] == ["b", "a"]
    assert got["weights"] == pytest.approx([0.75, 0.25])


def test_one_anchor_has_all_the_weight() -> None:
    for options in ({}, {"order": "published"}, {"weights": "softmax"}):
        assert made([0.4, -0.4], top_m=1, **options)["weights"] == [1.0]


def test_ties_go_to_the_first_of_the_bank() -> None:
    assert made([0.5, 0.7, 0.5, 0.7], top_m=3)["anchors"] == ["b", "d", "a"]
    # Equal in six decimals is a tie: the last bits depend on who else is in the product.
    assert made([0.5, 0.5 + 1e-9], top_m=1) == made([0.5 + 1e-9, 0.5], top_m=1)


@settings(deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=4),
    st.integers(1, 6),
    st.sampled_from(["cosine", "softmax"]),
    st.sampled_from(["right", "published"]),
)
def test_any_recipe(similarities: list[float], top_m: int, weights: str, order: str) -> None:
    if order == "published":
        similarities = [abs(one) + 1e-3 for one in similarities]
    got = made(similarities, top_m=top_m, weights=weights, order=order)
    count = min(top_m, len(similarities))
    assert len(set(got["anchors"])) == len(got["anchors"]) == len(got["weights"]) == count
    assert sum(got["weights"]) == pytest.approx(1)
    assert min(got["weights"]) >= 0
    # Right: never a larger weight for a smaller similarity; published: never a smaller one.
    right = got["weights"] if order == "right" else got["weights"][::-1]
    assert right == sorted(right, reverse=True)
    assert got["similarities"] == sorted(got["similarities"], reverse=True)
    left_out = [s for m, s in zip(MEMBERS, similarities, strict=False) if m not in got["anchors"]]
    assert all(s <= min(got["similarities"]) + 1e-6 for s in left_out)


ALL_OPTIONS = [
    FusionOptions(top_m=top_m, weights=weights, order=order)
    for top_m in (1, 3, 8, 20)
    for weights in ("cosine", "softmax")
    for order in ("right", "published")
]


@pytest.mark.parametrize("options", ALL_OPTIONS)
def test_all_users_at_once_as_one_by_one(options: FusionOptions) -> None:
    """Coarse similarities, so that most users have ties and some no positive one."""
    drawn = np.random.default_rng(0).integers(-6, 3, (200, 13)) / 4
    drawn[:5] = -0.25
    for similarities in (drawn, drawn.astype(np.float32)):
        members, values, weights = recipes(similarities, options)
        for user in range(len(similarities)):
            alone = recipe_alone(similarities[user], range(13), options)
            assert members[user].tolist() == alone["anchors"]
            assert values[user].tolist() == alone["similarities"]
            assert weights[user] == pytest.approx(alone["weights"], abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("options", ALL_OPTIONS)
def test_company_changes_no_bit_of_a_recipe(options: FusionOptions) -> None:
    """Whatever the block: what is trained later is found again by these numbers.

    In float64, as the stage has it: float32's last bit is too near to the sixth decimal.
    """
    users, bank = (unit_vectors(count, 24, count).astype(np.float64) for count in (101, 11))
    whole = search(users, bank, options)
    assert [len(part) for part in whole] == [101] * 3
    for block in (1, 7, 100):
        for one, other in zip(whole, search(users, bank, options, block), strict=True):
            assert np.array_equal(one, other)

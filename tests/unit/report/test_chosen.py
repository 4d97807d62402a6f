"""Of which sort the anchors are that merging chose."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from tasks.recipes import Recipe
from tasks.report.chosen import chosen_by_merging, weights_by_sort
from tasks.results.run import Cell
from tasks.results.store import Store
from tests.unit.report.cells import anchor, cell, compared, merging, stored, users

RECIPES: dict[str, dict[str, Any]] = {
    "u": {"anchors": ["a", "b"], "similarities": [0.9, 0.1], "weights": [0.75, 0.25]},
    "v": {"anchors": ["c", "a"], "similarities": [0.2, 0.6], "weights": [0.5, 0.5]},
    "w": {"anchors": ["b", "c"], "similarities": [0.4, 0.3], "weights": [1.0, 0.0]},
}


def test_weights_by_hand() -> None:
    """Anchor c stands for one user of sort 0 and one of sort 10.

    u (sort 0): a is its own, .75. v (0): c .5 x .5, a .5, so .75. w (10): b none, c weighs nothing.
    Equal weights on the same: u .5, v (.5 + 1) / 2 = .75, w .5 / 2 = .25. On all three: sort 0 has
    1.5 of 3 anchors, sort 10 has .5.
    """
    anchors = {"a": {"0": 1.0}, "b": {"2": 1.0}, "c": {"0": 0.5, "10": 0.5}}
    recipes = {user: Recipe.model_validate(recipe) for user, recipe in RECIPES.items()}
    found = weights_by_sort(recipes, {"u": "0", "v": "0", "w": "10"}, anchors)
    assert found.rows == ["0", "10"]
    assert found.columns == ["0", "2", "10"]
    assert found.users == [2, 1]
    assert found.anchors == [1.5, 1.0, 0.5]
    assert found.weights == [[0.75, 0.125, 0.125], [0.0, 1.0, 0.0]]
    assert found.same_sort == pytest.approx((0.75 + 0.75 + 0.0) / 3)
    assert found.equal_chosen == pytest.approx((0.5 + 0.75 + 0.25) / 3)
    assert found.equal_all == pytest.approx((0.5 + 0.5 + 0.5 / 3) / 3)


def merged(**parts: Any) -> Cell:
    chosen = [anchor("a", 0), anchor("b", -1), anchor("c", 0), anchor("failed", 3)]
    trained = {name: name for name in "abc"}
    bank = merging(("merge_only", "mta"), chosen, RECIPES, trained)
    return cell(compared(), mergings=(bank,), users=users(**parts))


def test_by_cluster_where_nothing_is_known(where: Store) -> None:
    """u and v are most like a (cluster 0), w most like b (noise). `failed` was not trained."""
    (found,) = chosen_by_merging(merged())
    assert (found.by, found.methods) == ("cluster", ("merge_only", "mta"))
    assert found.weights.rows == found.weights.columns == ["0", "noise"]
    assert found.weights.weights == [[0.875, 0.125], [0.0, 1.0]]
    assert found.weights.same_sort == pytest.approx((0.75 + 1.0 + 1.0) / 3)


def test_by_archetype_where_it_is_known(where: Store) -> None:
    first = {"a": 1, "b": 0, "c": 1, "u": 1, "v": 0, "w": 1}
    table = pl.DataFrame({"user_id": list(first), "first": list(first.values())})
    (found,) = chosen_by_merging(merged(population=stored("prepare", table)))
    assert found.by == "archetype"
    assert found.weights.rows == found.weights.columns == ["0", "1"]
    assert found.weights.weights == [[0.0, 1.0], [0.625, 0.375]]

"""What each method costs per user, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl
import pytest

from tasks.methods import METHODS
from tasks.report.table import costs
from tasks.results.models import Answers
from tasks.results.run import Cell
from tasks.results.store import Store
from tests.unit.report.cells import batch, cell, compared, merging, stored, users

# Histories of two users: "ab" + "x" and "é" + "yz" are 3 and 4 bytes, "abcd" + "x" is 5.
PROFILES = [
    [
        {"id": "1", "text": "ab", "answer": "x"},
        {"id": "2", "text": "é", "answer": "yz"},
    ],
    [{"id": "3", "text": "abcd", "answer": "x"}],
]
ANSWERING = [[1.0, 2.0], [6.0]]


def batches(
    size: int, steps: list[list[int]], tokens: list[list[int]], training: list[list[float]]
) -> tuple[Answers, ...]:
    """Batches whose users' seconds are those of training and of answering together."""
    return tuple(
        batch(size, [(s, t, a + b) for s, t, a, b in zip(*one, strict=True)])
        for one in zip(steps, tokens, training, ANSWERING, strict=True)
    )


@pytest.fixture
def costly(where: Store) -> Cell:
    """Two batches of users, of two and of one, but two users in the tables of history."""
    history = stored("prepare", pl.DataFrame({"user_id": ["u", "v"], "profile": PROFILES}))
    recipes: dict[str, Any] = {
        user: {"anchors": anchors, "similarities": [0.5, 0.1], "weights": [0.8, 0.2]}
        for user, anchors in {"u": ["aa", "b"], "v": ["b", "aa"], "w": ["b", "ö"]}.items()
    }
    evidence = zip(recipes.items(), (0.1, 0.2, 0.6), strict=True)
    weighed = {user: recipe | {"seconds": seconds} for (user, recipe), seconds in evidence}
    plain = batches(0, [[0, 0], [0]], [[0, 0], [0]], [[0.0, 0.0], [0.0]])
    two = batches(800, [[4, 6], [8]], [[100, 200], [600]], [[0.5, 1.0], [3.0]])
    return cell(
        compared(),
        users=users(few_shot=history),
        mergings=(
            merging(("merge_only", "mta"), recipes=weighed),
            merging(("mta_published",), recipes=recipes),
        ),
        answers=dict.fromkeys(("base", "rag", "merge_only"), plain)
        | {
            "oppu": batches(3200, [[9, 9], [3]], [[50, 70], [30]], [[2.0, 2.0], [5.0]]),
            "stack_only": two,
            "mta": two,
            "mta_published": batches(400, [[2, 2], [2]], [[10, 10], [10]], [[0.1, 0.1], [0.1]]),
        },
    )


# Answers take 3 s on average (1, 2 and 6). Recipes: ids of 3, 3 and 3 bytes, two weights of 8.
# Evidence takes 0.3 s on average.
WANTED = {
    "base": (0.0, 0.0, 0.0, 3.0),
    # 7 and 5 bytes of history.
    "rag": (6.0, 0.0, 0.0, 3.0),
    # Steps 9, 9, 3; tokens 50, 70, 30; seconds 2, 2, 5.
    "oppu": (3200.0, 7.0, 50.0, 6.0),
    # Steps 4, 6, 8; tokens 100, 200, 600; seconds 0.5, 1, 3. No recipe and no evidence.
    "stack_only": (800.0, 6.0, 300.0, 4.5),
    "merge_only": (19.0, 0.0, 0.0, 3.3),
    "mta": (819.0, 6.0, 300.0, 4.8),
    # Its own bank is weighed by cosines.
    "mta_published": (419.0, 2.0, 10.0, 3.1),
}


@pytest.mark.parametrize("method", WANTED)
def test_by_hand(costly: Cell, method: str) -> None:
    """Users count alike, whatever the sizes of batches."""
    found = costs(costly, method)
    assert found.pop("passes_per_answer") == 1
    names = ("bytes_per_user", "steps_per_user", "tokens_per_user", "seconds_per_user")
    assert found == dict(zip(names, map(pytest.approx, WANTED[method]), strict=True))


@pytest.mark.parametrize(("passes", "wanted"), [(1.0, 1), (0.0, 0), (None, 5 / 3)])
def test_passes_by_hand(
    costly: Cell, monkeypatch: pytest.MonkeyPatch, passes: float | None, wanted: float
) -> None:
    """A method's own number, or one for each anchor that weighs anything: 2, 1 and 2 of them."""
    monkeypatch.setitem(METHODS, "merge_only", replace(METHODS["merge_only"], passes=passes))
    recipes: dict[str, Any] = {
        user: {"anchors": ["aa", "b"], "similarities": [0.5, 0.1], "weights": weights}
        for user, weights in {"u": [0.8, 0.2], "v": [1.0, 0.0], "w": [1.5, -0.5]}.items()
    }
    one = costly.model_copy(update={"mergings": (merging(("merge_only",), recipes=recipes),)})
    assert costs(one, "merge_only")["passes_per_answer"] == pytest.approx(wanted, abs=0.005)

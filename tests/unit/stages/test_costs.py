"""What each method costs per user, worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.report.table import costs
from tasks.store.artifacts import Store
from tasks.store.pieces import digest

# Histories of two users: "ab" + "x" and "é" + "yz" are 3 and 4 bytes, "abcd" + "x" is 5.
PROFILES = [
    [
        {"id": "1", "text": "ab", "answer": "x"},
        {"id": "2", "text": "é", "answer": "yz"},
    ],
    [{"id": "3", "text": "abcd", "answer": "x"}],
]


def shard(size: int, steps: list[int], tokens: list[int], seconds: list[float]) -> dict[str, Any]:
    work = [{"steps": s, "tokens": t} for s, t in zip(steps, tokens, strict=True)]
    return {"value": {"bytes_per_user": size, "work": work}, "notes": {"per_user": seconds}}


@pytest.fixture
def summary(where: Store) -> dict[str, Any]:
    """Two batches of users, of two and of one, but two users in the tables of history."""

    def users(out: Path) -> dict[str, Any]:
        pl.DataFrame({"user_id": ["u", "v"], "profile": PROFILES}).write_parquet(
            out / "few_shot.parquet"
        )
        return {}

    def recipes(out: Path) -> dict[str, Any]:
        rows = {
            "user_id": ["u", "v", "w"],
            "anchors": [["aa", "b"], ["b", "aa"], ["b", "ö"]],
            "similarities": [[0.5, 0.1]] * 3,
            "weights": [[0.8, 0.2]] * 3,
        }
        pl.DataFrame(rows).write_parquet(out / "recipes.parquet")
        return {}

    fused = {"ref": where.get("fusion", digest(1), recipes).ref}
    answered = [{"notes": {"per_user": [1.0, 2.0]}}, {"notes": {"per_user": [6.0]}}]
    plain = {"fusion": fused, "evidence": None}
    weighed = {"fusion": fused, "evidence": {"notes": {"per_user": [0.1, 0.2, 0.6]}}}
    methods = ("base", "rag", "oppu", "stack_only", "merge_only", "mta", "mta_published")
    two = [shard(800, [4, 6], [100, 200], [0.5, 1.0]), shard(800, [8], [600], [3.0])]
    return {
        "prepared": {"ref": where.get("prepare", digest(2), users).ref},
        "answered": dict.fromkeys(methods, answered),
        "banks": {"merge_only": weighed, "mta_published": plain},
        "bank_of": {
            "merge_only": "merge_only",
            "mta": "merge_only",
            "mta_published": "mta_published",
        },
        "stacking": {
            "oppu": [shard(3200, [9, 9], [50, 70], [2.0, 2.0]), shard(3200, [3], [30], [5.0])],
            "stack_only": two,
            "mta": two,
            "mta_published": [shard(400, [2, 2, 2], [10, 10, 10], [0.1, 0.1, 0.1])],
        },
    }


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
def test_by_hand(where: Store, summary: dict[str, Any], method: Any) -> None:
    """Users count alike, whatever the sizes of batches."""
    found = costs(summary, method, where)
    names = ("bytes_per_user", "steps_per_user", "tokens_per_user", "seconds_per_user")
    assert found == dict(zip(names, map(pytest.approx, WANTED[method]), strict=True))

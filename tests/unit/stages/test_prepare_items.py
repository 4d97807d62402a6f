"""`split.few_shot_items`: the first items of each few-shot user, and the optimum from as many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.config.run import resolve
from tasks.lamp.synthetic import World
from tasks.lamp.synthetic.optimum import optimal_answers
from tasks.prepare import described, prepared_users
from tasks.results.models import Prepared
from tasks.results.store import Store
from tasks.users import users_of
from tests.unit.stages.users import user, write_users

# Histories of 2, 5 and 9 items.
GIVEN = {
    "base": [user("base-1", 3)],
    "anchor": [user("anchor-1", 5)],
    "few_shot": [user(f"few-{n}", n, queries=1) for n in (2, 5, 9)],
}


def run(data: Path | str, most: int | None, **given: Any) -> Prepared:
    settings = {"data": str(data), "anchors": {"min_items": 1}, "split": {"few_shot_items": most}}
    return prepared_users(resolve(settings | given).for_task("LaMP-2M", 0))


@pytest.mark.parametrize(
    ("most", "kept", "unseen"),
    [(None, [2, 5, 9], 0), (1, [1, 1, 1], 13), (5, [2, 5, 5], 4), (9, [2, 5, 9], 0)],
)
def test_the_first_items_are_kept_and_the_rest_is_counted(
    where: Store, tmp_path: Path, most: int | None, kept: list[int], unseen: int
) -> None:
    """With 5 only the third user loses items, 4 of them; the first has fewer than are allowed."""
    prepared = run(write_users(tmp_path / "data", **GIVEN), most)
    users = users_of(prepared.few_shot)
    wanted = [
        [f"few-{n}-{number}" for number in range(count)]
        for n, count in zip((2, 5, 9), kept, strict=True)
    ]
    assert [[item["id"] for item in found["profile"]] for found in users] == wanted
    assert prepared.counts["unseen_few_shot_items"] == unseen
    lines = [line for line in described(prepared, "grouped") if "unseen" in line]
    assert lines == ([f"unseen few shot items: {unseen}"] if unseen else [])
    # Nobody else loses anything; queries stay.
    assert len(users_of(prepared.anchor)[0]["profile"]) == 5
    assert len(users_of(prepared.base)[0]["profile"]) == 3
    assert [len(found["query"]) for found in users] == [1, 1, 1]


def test_the_optimum_knows_as_many_items(where: Store, tmp_path: Path) -> None:
    """Against `optimal_answers` of the same world.

    One item says less than all twelve, so `bayes` answers otherwise; the others do not change.
    """
    world = {
        "base_users": 2,
        "anchor_candidates": 2,
        "few_shot_users": 12,
        "items_min": 4,
        "items_max": 5,
        "few_shot_items": 12,
        "queries": 6,
    }
    written = World("LaMP-2M", resolve({"synthetic": world}).synthetic, 0)
    found = {}
    for most in (1, None):
        prepared = run("synthetic", most, synthetic=world)
        assert prepared.optimum
        found[most] = pl.read_parquet(where.path(prepared.optimum))
        assert found[most].equals(optimal_answers(written, most))
        queries = [q["id"] for item in users_of(prepared.few_shot) for q in item["query"]]
        assert found[most]["query_id"].to_list() == queries
        assert len(queries) == 72
    for name in ("nonpersonal", "oracle"):
        assert found[1][name].equals(found[None][name])
    assert not found[1]["bayes"].equals(found[None]["bayes"])


def test_a_given_file_has_no_optimum(where: Store, tmp_path: Path) -> None:
    assert run(write_users(tmp_path / "data", **GIVEN), 5).optimum is None

"""Development users, split off the anchor candidates: few-shot users are not looked at."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.errors import InputError
from tasks.lamp.dataset import Dataset, split_off, write_dataset
from tasks.lamp.definitions import TASKS, get_task
from tasks.lamp.formats import copy_users
from tasks.lamp.options import SplitOptions

TASK = get_task("LaMP-2M")
LENGTHS = {"c0": 2, "c1": 3, "c2": 8, "c3": 14, "c4": 40}


def user(name: str, items: int, **more: Any) -> dict[str, Any]:
    profile = [
        {"id": f"{name}-{n}", "description": f"film {n} of {name}", "tag": TASK.labels[n % 15]}
        for n in range(items)
    ]
    return {"user_id": name, "profile": profile, **more}


def asked(name: str) -> list[dict[str, str]]:
    return [{"id": f"{name}-q", "input": f"Which tag? description: {name}?", "gold": "comedy"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "base_LLM": [user("b0", 4)],
        "anchor_candidate": [user(name, count) for name, count in LENGTHS.items()],
        "few_shot": [user("f0", 5, query=asked("f0"))],
    }
    for name, users in files.items():
        (tmp_path / f"user_{name}.json").write_text(json.dumps(users))
    return tmp_path


def written(folder: Path, out: Path, **options: Any) -> Dataset:
    out.mkdir()
    everyone = out / "everyone.arrow"
    found = copy_users(folder, TASK, everyone)
    split = SplitOptions(**options)
    return write_dataset(everyone, Counter(found.dropped), split, TASK, seed=0)


def test_half_of_the_candidates_stand_in_the_few_shot_users_place(
    folder: Path, tmp_path: Path
) -> None:
    """Of four with three items or more two; each is asked its last third, at most five."""
    made = written(folder, tmp_path / "made", development=True)
    sides = {
        side: pl.read_parquet(tmp_path / "made" / f"{side}.parquet")
        for side in ("base", "anchor", "few_shot")
    }
    assert sides["base"]["user_id"].to_list() == ["b0"]
    chosen = sides["few_shot"]["user_id"].to_list()
    assert len(chosen) == 2
    assert sorted([*chosen, *sides["anchor"]["user_id"]]) == sorted(LENGTHS)
    assert made.few_shot_ids == tuple(chosen)
    for row in sides["few_shot"].iter_rows(named=True):
        name, length = row["user_id"], LENGTHS[row["user_id"]]
        count = {3: 1, 8: 2, 14: 4, 40: 5}[length]
        numbers = [*range(length - count, length)]
        assert [query["id"] for query in row["query"]] == [f"{name}-{n}" for n in numbers]
        # The instruction is that of the data's own queries.
        first = row["query"][0]
        assert first["input"] == f"Which tag? description: film {numbers[0]} of {name}"
        assert first["gold"] == TASK.labels[numbers[0] % 15]
        shown = [item["id"] for item in row["profile"]]
        assert shown == [f"{name}-{n}" for n in range(length - count)][-10:]
    # What is said of the users is said of these, not of those who are not looked at.
    assert made.counts["few_shot_users"] == 2
    assert made.counts["anchor_candidates"] == 3
    assert made.counts["queries"] == made.audit["queries"]["few_shot"]["asked"]
    assert made.counts["queries"] == sum(map(len, sides["few_shot"]["query"]))


def test_another_seed_draws_others(folder: Path, tmp_path: Path) -> None:
    candidates = pl.read_parquet(_anchor(folder, tmp_path))
    drawn = {
        tuple(split_off(candidates, TASK, "?", seed)[1]["user_id"]) for seed in range(100, 110)
    }
    assert len(drawn) > 1


def test_too_few_candidates_give_one_line(folder: Path, tmp_path: Path) -> None:
    candidates = pl.read_parquet(_anchor(folder, tmp_path))
    with pytest.raises(InputError, match=r"split\.development: 2 anchor candidates are too few"):
        split_off(candidates.head(2), TASK, "?", 0)
    with pytest.raises(InputError, match="items of LaMP-7 are no questions"):
        split_off(candidates, TASKS["LaMP-7"], "?", 0)


def _anchor(folder: Path, tmp_path: Path) -> Path:
    written(folder, tmp_path / "all")
    return tmp_path / "all" / "anchor.parquet"


@pytest.mark.parametrize("development", [False, True])
def test_base_users_may_be_candidates_but_not_development_users(
    folder: Path, tmp_path: Path, development: bool
) -> None:
    apart = written(folder, tmp_path / "apart", development=development)
    both = written(folder, tmp_path / "both", development=development, base_candidates=True)

    def side(run: str, name: str) -> pl.DataFrame:
        return pl.read_parquet(tmp_path / run / f"{name}.parquet")

    for name in ("base", "few_shot"):
        assert side("both", name).equals(side("apart", name))
    assert side("both", "anchor").equals(
        pl.concat([side("apart", "anchor"), side("apart", "base")])
    )
    assert both.counts == apart.counts | {"base_users_as_candidates": 1}
    assert both.audit == apart.audit
    # b0 has 4 items, and c4 40, unless c4 is a development user.
    assert both.longest_candidate == max(4, apart.longest_candidate)

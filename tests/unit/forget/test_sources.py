"""Where a user to forget came from is where `prepare` reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.config.run import resolve
from tasks.forget.user import in_sources
from tasks.lamp.definitions import get_task
from tasks.lamp.formats import read_users
from tests.unit.lamp.helpers import write
from tests.unit.lamp.test_papers import graph


@pytest.mark.parametrize("remembered", [True, False])
def test_a_file_per_task_and_citations_by_several_seeds(tmp_path: Path, remembered: bool) -> None:
    """The texts are the questions of every seed that a run had; without a run, of seed 0."""
    file = write(tmp_path / "LaMP-1.json", graph(3))
    config = resolve({"data": str(tmp_path), "lamp_tasks": ["LaMP-1"], "seeds": [3, 4]})
    runs = [{"config": config.model_dump(mode="json")}] if remembered else []
    sources, texts = in_sources(runs, "u1", None if remembered else tmp_path)
    assert sources == [str(file)]
    expected = set()
    for seed in (3, 4) if remembered else (0,):
        users = read_users(file, get_task("LaMP-1"), seed).users
        (row,) = (one for one in users.to_dicts() if one["user_id"] == "u1")
        expected |= {item["text"] for item in row["profile"]}
    assert texts == expected
    assert len(texts) > 10 or not remembered

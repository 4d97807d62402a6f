"""The preset `real` on a few real people, with a tiny model in SmolLM2's place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.lamp_task import lamp_task
from tasks.config.run import resolve
from tasks.lamp.definitions import MOVIE_TAGS
from tests.unit.stages.pipeline import predictions
from tests.unit.stages.users import FILES

TASK = "LaMP-2M"
REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "real" / "small"
# So many of each file, and of a few-shot user's queries.
USERS, QUERIES = 5, 2


@pytest.mark.skipif(not REAL.is_dir(), reason="real histories (shared/data/real) are not here")
def test_preset_real_end_to_end(place: Path, tmp_path: Path) -> None:
    """Every method of it answers every query, with a label."""
    (tmp_path / "few" / TASK).mkdir(parents=True)
    asked = set()
    for name in FILES.values():
        users = json.loads((REAL / TASK / name).read_text())[:USERS]
        for user in users:
            user["query"] = user.get("query", [])[:QUERIES]
            asked |= {str(query["id"]) for query in user["query"]}
        (tmp_path / "few" / TASK / name).write_text(json.dumps(users))
    config = resolve(
        {
            "preset": "real",
            # Shorter than the preset's, as the model is slow with what it has no words for.
            "base": {"model": str(place / "model"), "max_tokens": 96},
            "data": str(tmp_path / "few"),
            "lamp_tasks": [TASK],
            "scoring": {"answer": "constrained"},
        }
    )
    cell = lamp_task(config.for_task(TASK, 0))
    assert cell.missing == ()
    assert set(cell.answers) == set(config.methods)
    assert len(config.methods) == 13
    for method in config.methods:
        given = predictions(cell, method)
        assert set(given) == asked
        assert set(given.values()) <= set(MOVIE_TAGS)

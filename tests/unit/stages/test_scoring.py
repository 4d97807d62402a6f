"""The stages `score` and `compare` on headlines that are not in English."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.compare import compare
from tasks.config import resolve
from tasks.lamp.definitions import get_task
from tasks.lamp.metrics import Rules, rules_of
from tasks.scoring import score
from tasks.stage import store
from tasks.store.artifacts import Store
from tasks.store.pieces import Piece, digest, library_versions
from tests.unit.stages.users import result

# query -> gold; all are answered with the gold itself.
HEADLINES = {"a": "भारत ने मैच जीता", "b": "今天天气好", "c": "Rain today"}


def handed(piece: Piece) -> dict[str, Any]:
    return {"ref": piece.ref, "value": piece.value, "notes": piece.notes, "cached": piece.cached}


@pytest.fixture
def answered(where: Store) -> dict[str, Any]:
    def make(out: Path) -> dict[str, Any]:
        rows = [
            {"row": n, "user_id": f"u{n}", "query_id": query, "gold": gold, "prediction": gold}
            for n, (query, gold) in enumerate(HEADLINES.items())
        ]
        pl.DataFrame(rows).write_parquet(out / "predictions.parquet")
        return {}

    return handed(where.get("predictions", digest("answers"), make))


@pytest.fixture
def prepared(where: Store) -> dict[str, Any]:
    def make(out: Path) -> dict[str, Any]:
        groups = {"user_id": ["u0", "u1", "u2"], "group": ["g0", "g1", "g2"]}
        pl.DataFrame(groups).write_parquet(out / "few_shot.parquet")
        return {}

    return handed(where.get("prepare", digest("prepared"), make))


def scores(answered: dict[str, Any], rules: Rules) -> dict[str, Any]:
    return result(score.fn("LaMP-4", "base", [answered], rules))


def key(answered: dict[str, Any], rules: str) -> str:
    return digest(
        {
            "version": 3,
            "libraries": library_versions(("rouge-score", "polars")),
            "lamp_task": "LaMP-4",
            "predictions": [answered["ref"]["sha256"]],
            "rules": rules,
        }
    )


def test_headlines_of_other_scripts(
    answered: dict[str, Any], prepared: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """By LaMP's rule one of three identical headlines counts, and it is said that two cannot."""
    line = "LaMP-4, base: 2 golds have no letter a to z and no digit"
    for cached in (False, True):
        lamp = scores(answered, "lamp")
        assert lamp["cached"] == cached
        assert lamp["value"]["metrics"] == {"rouge1": pytest.approx(1 / 3), "rougeL": 1 / 3}
        assert lamp["notes"]["golds_without_token"] == 2
        assert line in capsys.readouterr().out
    # Which it is in no key and no value: what was scored before is found.
    assert lamp["ref"]["uri"] == f"score/{key(answered, 'lamp')}"
    assert "golds_without_token" not in store().open(lamp["ref"]).value
    unicode = scores(answered, "unicode")
    assert unicode["value"]["metrics"] == {"rouge1": 1, "rougeL": 1}
    assert unicode["notes"]["golds_without_token"] == 0
    assert line not in capsys.readouterr().out

    for tokens, wanted in (("lamp", 1 / 3), ("unicode", 1)):
        config = resolve({"scoring": {"tokens": tokens}}).model_dump(mode="json")
        state = compare.fn(config, "LaMP-4", prepared, {"base": lamp})
        intervals = result(state)["value"]["intervals"]["base"]
        assert intervals["rougeL"]["point"] == pytest.approx(wanted)


def test_tokens_are_of_text_alone() -> None:
    """Scores of labels are found again, whatever the tokens; by MTA's scorer there is no choice."""
    assert rules_of(get_task("LaMP-2M"), "lamp", "unicode") == "lamp"
    assert rules_of(get_task("LaMP-3"), "lamp", "unicode") == "lamp"
    assert rules_of(get_task("LaMP-5"), "lamp", "unicode") == "unicode"
    assert rules_of(get_task("LaMP-5"), "mta_published", "lamp") == "mta_published"

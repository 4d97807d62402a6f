"""The tiny base model, trained as the embedded benchmark trains it, against what is known."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tasks import base_model as base_model_stage
from tasks import scoring
from tasks.base_model import base_model
from tasks.compare import compare
from tasks.config import resolve
from tasks.prepare import prepare
from tests.unit.stages.pipeline import Quiet
from tests.unit.stages.users import result


@pytest.mark.parametrize("lamp_task", ["LaMP-1", "LaMP-2M"])
def test_as_good_as_an_answer_without_the_user_can_be(
    lamp_task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracy on the default world within .05 of the best non-personal answers to its queries.

    Those come from the population itself (tasks/lamp/synthetic/optimum.py), not from a model. It is
    not far above them either: a base model that beats them has seen the users it is asked about.
    """
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "store"))
    for module in (base_model_stage, scoring):
        monkeypatch.setattr(module, "gpu_slot", contextlib.nullcontext)
    monkeypatch.setattr(base_model_stage, "Progress", Quiet)
    options = resolve({"lamp_tasks": [lamp_task], "methods": ["base"]}).for_task(lamp_task, 0)
    config = options.model_dump(mode="json")
    prepared = result(prepare.fn(config, lamp_task))
    given = {
        "prepared": prepared,
        "base": result(base_model.fn(config, lamp_task, prepared)),
        "banked": None,
        "fused": None,
    }
    users = prepared["value"]["few_shot"]
    answered = result(scoring.predict.fn(config, lamp_task, given, "base", 0, users, None))
    scored = result(scoring.score.fn(lamp_task, "base", [answered], options.scoring.metrics))
    compared = result(compare.fn(config, lamp_task, prepared, {"base": scored}))
    intervals = compared["value"]["intervals"]
    base, best = (intervals[name]["accuracy"]["point"] for name in ("base", "nonpersonal"))
    assert best - 0.05 <= base <= best + 0.02

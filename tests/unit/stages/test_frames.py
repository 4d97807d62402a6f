"""How far a reader has to go: few calls of our own lie between a stage's job and its arithmetic."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest

import tasks
from tasks.lora import group_train, merge
from tests.unit.stages.pipeline import OPTIONS, ROLES, run

OURS = str(Path(tasks.__file__).parent)
# Callers from `Stage.made`, which is the first of them, to what is called.
MOST = 5


def callers() -> list[str]:
    """Our own functions on the stack, from `Stage.made` inwards."""
    names: list[str] = []
    for frame, _ in traceback.walk_stack(None):
        if frame.f_code.co_filename.startswith(OURS):
            names.insert(0, frame.f_code.co_name)
        if frame.f_code.co_name == "made":
            break
    assert names[0] == "made"
    return names


def watched(patch: pytest.MonkeyPatch, place: Any, name: str) -> list[list[str]]:
    """The callers of each call of a function from here on."""
    seen: list[list[str]] = []
    real = getattr(place, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(callers())
        return real(*args, **kwargs)

    patch.setattr(place, name, call)
    return seen


def test_few_calls_lie_between_a_job_and_its_arithmetic(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the sum of anchors' LoRAs, and to the optimiser's step of everything that is trained.

    The sum as it is made of banks that fit in memory; others merge anew for every batch.
    """
    sums = watched(monkeypatch, merge, "_merge_layer")
    steps = watched(monkeypatch, group_train._AdamW, "step")
    run(
        place,
        ROLES,
        methods=["mta"],
        anchors=OPTIONS["anchors"] | {"train_on": "both", "clustering": "kmeans"},
        base={"task_adapt": {"enabled": True, "train_on": "profile"}},
    )
    # The second is the stage; answers are given after the users' own LoRAs are trained.
    assert {names[1] for names in steps} == {"task_adapt", "meta_lora", "answers"}
    assert {tuple(names[1:3]) for names in sums} == {
        ("answers", "merged_and_trained"), ("answers", "answered")
    }  # fmt: skip
    for names in (*sums, *steps):
        assert len(names) <= MOST, " -> ".join(names)

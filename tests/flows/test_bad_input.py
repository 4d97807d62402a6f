"""Bad input ends a run with one clear line, and leaves nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.mta import mta
from tasks.tools.main import main
from tests.flows.conftest import folders, records
from tests.small import SMALL


def record(**changes: Any) -> dict[str, Any]:
    item = {"id": "i", "tag": "comedy", "description": "a film"}
    return {"user_id": "u1", "profile": [item], "query": []} | changes


def missing_folder(folder: Path) -> dict[str, Any]:
    return {"data": str(folder / "nowhere")}


def truncated_json(folder: Path) -> dict[str, Any]:
    file = folder / "users.json"
    file.write_text(json.dumps([record()])[:-12])
    return {"data": str(file)}


def no_profile(folder: Path) -> dict[str, Any]:
    file = folder / "users.json"
    broken = record(user_id="u2")
    del broken["profile"]
    file.write_text(json.dumps([record(), broken]))
    return {"data": str(file)}


def no_model(folder: Path) -> dict[str, Any]:
    return {"base": {"model": str(folder / "no-model")}}


def pickled_model(folder: Path) -> dict[str, Any]:
    model = folder / "pickled"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return {"base": {"model": str(model)}}


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (missing_folder, ["nowhere", "no such file or folder"]),
        (truncated_json, ["users.json", "line 1"]),
        (no_profile, ["users.json", "record 1", "u2", "no profile"]),
        (no_model, ["base.model", "no-model"]),
        (pickled_model, ["base.model", "safetensors"]),
    ],
)
def test_one_line_says_what_is_wrong(
    workplace: Path, prepare: Callable[[Path], dict[str, Any]], expected: list[str]
) -> None:
    state = mta(**(SMALL | prepare(workplace)), return_state=True)
    assert state.is_failed()
    message = state.message or ""
    assert "\n" not in message
    assert "Traceback" not in message
    for part in expected:
        assert part in message
    store = workplace / ".mta" / "store"
    assert not list((store / ".making").glob("*"))
    for stage in ("tiny_model", "meta_lora", "answers"):
        assert not records(workplace, stage)
        assert not folders(workplace, stage)
    assert not (workplace / ".mta" / "last_comparison.txt").exists()


def test_unknown_keys_are_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each kind by itself: tests/unit/stages/test_config.py."""
    monkeypatch.chdir(tmp_path)  # the run's own Prefect server has its files there
    given = ("stackin=8", 'stacking={"rnk": 8, "rank": 0}', "preset=papier")
    assert main(["run", *(word for pair in given for word in ("-p", pair))]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    for name in ("stackin:", "stacking.rnk:", "stacking.rank:", "preset:"):
        assert name in line

"""All stages with their store on S3, then on a second machine that has an empty cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.stage import store
from tests.unit.stages import pipeline

STAGES = {
    "prepare", "base", "embed", "anchors", "meta_lora", "bank", "fusion", "stacking",
    "predict base", "predict merge_only", "predict mta",
    "score base", "score merge_only", "score mta",
}  # fmt: skip


def test_a_second_machine_finds_all(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pipeline.prepared_place(tmp_path) as place:
        local = pipeline.run(place, pipeline.ROLES)
        monkeypatch.setenv("MTA_STORE", s3)
        monkeypatch.setenv("MTA_STORE_CACHE", str(tmp_path / "one"))
        first = pipeline.run(place, pipeline.ROLES)
        assert {name for name in first["states"] if "Cached" in first["states"][name]} == set()
        monkeypatch.setenv("MTA_STORE_CACHE", str(tmp_path / "two"))
        second = pipeline.run(place, pipeline.ROLES)
        assert second["states"].keys() == STAGES
        assert {state for states in second["states"].values() for state in states} == {"Cached"}
        assert store().working() == []
    for done in (first, second):
        assert done["scores"]["mta"]["value"] == local["scores"]["mta"]["value"]
        assert done["bank"]["ref"] == local["bank"]["ref"]

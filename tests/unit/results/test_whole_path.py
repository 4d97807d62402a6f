"""All stages one after another: which users a second run takes from the first."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from tasks.record import library_versions
from tasks.results.store import store
from tests.unit.stages import pipeline

# What a stage says that makes something for a user.
MAKES = re.compile("^(embedding|training|answering for|evidence for)", re.MULTILINE)


def test_a_second_machine_takes_every_user_from_the_first(
    s3: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pipeline.prepared_place(tmp_path) as place:
        local = pipeline.run(place, pipeline.ROLES)
        monkeypatch.setenv("MTA_STORE", s3)
        monkeypatch.setenv("MTA_STORE_CACHE", str(tmp_path / "one"))
        capsys.readouterr()
        first = pipeline.run(place, pipeline.ROLES)
        assert len(MAKES.findall(capsys.readouterr().out)) > 2
        monkeypatch.setenv("MTA_STORE_CACHE", str(tmp_path / "two"))
        second = pipeline.run(place, pipeline.ROLES)
        assert MAKES.findall(capsys.readouterr().out) == []
        assert store().working() == []
        for cell in (first, second):
            assert cell.compared.intervals == local.compared.intervals
            merging, own = cell.merging("mta"), local.merging("mta")
            assert merging
            assert own
            assert merging.merged.bank.file == own.merged.bank.file
            assert pipeline.predictions(cell, "mta") == pipeline.predictions(local, "mta")


def test_another_version_of_a_library_takes_no_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What one torch made for a user is nothing that another would have made."""
    given = {"fusion": {"top_m": 2, "weights": "evidence"}, "methods": ["base", "mta"]}
    real = importlib.metadata.version

    def version(name: str) -> str:
        return "0.0" if name == "torch" else real(name)

    said = []
    with pipeline.prepared_place(tmp_path) as place:
        for torch_version in (real, real, version):
            monkeypatch.setattr(importlib.metadata, "version", torch_version)
            library_versions.cache_clear()
            capsys.readouterr()
            pipeline.run(place, pipeline.ROLES, **given)
            said.append(MAKES.findall(capsys.readouterr().out))
    library_versions.cache_clear()
    assert said == [said[0], [], said[0]]
    assert set(said[0]) == {"embedding", "training", "answering for", "evidence for"}

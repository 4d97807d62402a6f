"""Every test of a stage has a store of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.artifacts import Store
from tasks.stage import store


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "mta" / "store"))
    return store()

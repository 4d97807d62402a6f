"""Stores of a test's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tasks.store.artifacts import Store


# Imported where they are used: the engine's tests need no Prefect, as the engine needs none.
@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    from tasks.stage import store

    monkeypatch.setenv("MTA_STORE", str(tmp_path / "mta" / "store"))
    return store()


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def pieces(tmp_path: Path, warnings: list[str]) -> Store:
    from tasks.store.artifacts import Store

    return Store(tmp_path / "store", warn=warnings.append)

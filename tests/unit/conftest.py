"""What all unit tests share: stores of a test's own, and no deadlines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tasks.store.artifacts import Store

# No test fails by the clock: the first example of one may import a library, on a busy machine.
settings.register_profile("mta", deadline=None)
settings.load_profile("mta")


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

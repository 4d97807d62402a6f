"""What all unit tests share: a store of a test's own, and no deadlines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tasks.results.store import Store

# No test fails by the clock: the first example of one may import a library, on a busy machine.
settings.register_profile("mta", deadline=None)
settings.load_profile("mta")


# Imported where it is used: the engine's tests need no store, as the engine needs none.
@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    from tasks.results.store import store

    monkeypatch.setenv("MTA_STORE", str(tmp_path / "mta" / "store"))
    return store()

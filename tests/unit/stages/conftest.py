"""What tests that go through the whole pipeline share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.lora.checkpoint import Checkpoint, Saved
from tests.unit.stages import pipeline


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the base model for `pipeline.run`, and one store for the module's tests."""
    with pipeline.prepared_place(tmp_path_factory.mktemp("pipeline")) as folder:
        yield folder


@pytest.fixture(scope="module")
def first(place: Path) -> dict[str, Any]:
    return pipeline.run(place, pipeline.ROLES)


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Each job that trains is killed once, when it has kept its state for the first time."""
    done: list[Path] = []
    real = Checkpoint.save

    def save(self: Checkpoint, saved: Saved) -> None:
        real(self, saved)
        if self.path not in done:
            done.append(self.path)
            raise pipeline.Killed

    monkeypatch.setattr(Checkpoint, "save", save)
    return done

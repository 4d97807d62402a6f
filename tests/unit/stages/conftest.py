"""What tests that go through the whole pipeline share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tasks.lora.checkpoint import Checkpoint, Saved
from tasks.results.run import Cell
from tests.unit.stages import pipeline


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the base model for `pipeline.run`, and one store for the module's tests."""
    with pipeline.prepared_place(tmp_path_factory.mktemp("pipeline")) as folder:
        yield folder


@pytest.fixture(scope="module")
def first(place: Path) -> Cell:
    return pipeline.run(place, pipeline.ROLES)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What is made user by user from here on, by stage: for each call for whom, or for how many."""
    note = partial(pipeline.noted, monkeypatch)
    return {
        "embed": note("tasks.embed._vectors", pipeline.embedded_for),
        "meta_lora": note(
            "tasks.bank._train", lambda _options, chosen, *_: [one.name for one in chosen]
        ),
        "evidence": note("tasks.model.Model.log_likelihoods", lambda *given: len(given[2])),
        "stacking": note("tasks.stacking.seeds_of", lambda _setting, names: len(names)),
        "answers": note(
            "tasks.answer.answered",
            lambda batch, _adapted, numbers: [batch.names[number] for number in numbers],
        ),
    }


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

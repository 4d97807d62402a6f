"""A short run of the driver, and what it holds against a store."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tasks.record import File
from tasks.results.store import Store, store
from tests.faults.pieces import Given, Ledger

ROOT = Path(__file__).resolve().parents[2]
# One run by itself, in its own thread, killed as it has stored something. A process of it killed:
# tests/flows/test_runners.py (one that works for it) and test_local_server.py (its server). Killed
# while it makes its databases: tests/unit/test_databases.py. A damaged file: test_flow.py there.
KINDS = ("stored",)


@pytest.mark.slow
@pytest.mark.server
def test_nothing_is_lost_made_twice_or_different(
    tmp_path: Path, prefect_tables: Path, mlflow_tables: Path
) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    for file in (prefect_tables, mlflow_tables):
        shutil.copy(file, tables)
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--workers", "0", "--tables", str(tables),
         "--kills", str(len(KINDS)), "--kinds", *KINDS],
        cwd=ROOT, capture_output=True, text=True, timeout=880, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["lost"], found["twice"], found["differing"]) == (0, 0, 0)
    assert found["kinds"] == dict.fromkeys(KINDS, 1)
    assert found["pieces"] > 30


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "store"))
    return store()


def make(value: float, *keys: str) -> File:
    """Store a folder with these rows."""
    with store().new("stage", keys) as folder:
        save_file({"weight": np.array([value], np.float32)}, folder.path / "x.safetensors")
    return folder.file("x.safetensors")


def keep(root: Path, file: File, seconds: float = 1.0) -> Path:
    """What Prefect keeps of a stage's result."""
    path = root / "results" / "stage-key"
    path.parent.mkdir(exist_ok=True)
    data = {"file": file.model_dump(), "seconds": seconds}
    path.write_text(json.dumps({"result": json.dumps({"data": data})}))
    return path


def test_a_piece_that_went_is_lost_and_made_again_is_made_twice(place: Store) -> None:
    ledger = Ledger(place.root)
    file = make(1.0, "a")
    keep(place.root, file)
    ledger.look()
    ledger.look()
    assert (ledger.lost(), ledger.twice) == (set(), set())
    (place.root / file.uri).unlink()
    both = {"results/stage-key", "rows/a"}
    assert ledger.lost() == both
    keep(place.root, make(2.0, "a"))
    ledger.look()
    assert (ledger.lost(), ledger.twice) == (set(), both)


def test_what_the_driver_damaged_may_be_made_again_once(place: Store) -> None:
    ledger = Ledger(place.root)
    file = make(1.0, "a")
    keep(place.root, file)
    ledger.look()
    ledger.damage(place.root / file.uri)
    (place.root / file.uri).write_text("x")
    assert ledger.lost() == set()
    made = make(2.0, "a")
    keep(place.root, made)
    ledger.look()
    assert ledger.twice == set()
    keep(place.root, made, seconds=2.0)
    ledger.look()
    assert ledger.twice == {"results/stage-key"}


def test_a_known_row_may_be_stored_again_beside_a_new_one(place: Store) -> None:
    ledger = Ledger(place.root)
    make(1.0, "a")
    ledger.look()
    make(2.0, "a", "b")
    ledger.look()
    assert ledger.twice == set()
    make(3.0, "a", "b")
    ledger.look()
    assert ledger.twice == {"rows/a", "rows/b"}


def test_other_numbers_and_other_files_differ(place: Store) -> None:
    def given(weight: float, score: float, seconds: float) -> Given:
        run = {"file": make(weight, "a").model_dump(), "score": score, "seconds": seconds}
        return Given(run, place.root)

    first = given(1.0, 0.5, 1.0)
    assert first.differing(given(1.000001, 0.5, 2.0)) == []
    assert first.differing(given(1.001, 0.5, 1.0)) == ["run.file: other tensors"]
    assert first.differing(given(1.0, 0.6, 1.0)) == ["run.score: 0.5 and 0.6"]

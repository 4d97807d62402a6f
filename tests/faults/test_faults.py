"""A short run of the driver, and what it holds against a store."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.store.artifacts import Store
from tests.faults.pieces import Ledger, whole

ROOT = Path(__file__).resolve().parents[2]
KILLS = 6
# On the stack a full disk, a truncated file, the worker, the server; alone the run in its first
# seconds, on a fresh state, and the helper.
SEED = 262


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(900)
def test_nothing_is_lost_made_twice_or_different() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--kills", str(KILLS), "--seed", str(SEED)],
        cwd=ROOT, capture_output=True, text=True, timeout=880, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["lost"], found["twice"], found["differing"]) == (0, 0, 0)
    assert found["kills"] == sum(found["kinds"].values()) == KILLS
    assert found["kinds"]["early"] == 1
    assert found["pieces"] > 30


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, Ledger]:
    """A store of three pieces, as an undisturbed run left it."""
    store, journal = Store(tmp_path / "store"), tmp_path / "journal.jsonl"
    monkeypatch.setenv("MTA_JOURNAL", str(journal))
    for stage in ("tokens", "meta_lora", "score"):
        make(store, stage, "1")
    undisturbed = whole(store.root)
    assert len(undisturbed) == 3
    return store, Ledger(undisturbed, journal, before=dict(undisturbed))


def make(store: Store, stage: str, text: str) -> None:
    def write(out: Path) -> dict[str, Any]:
        (out / "file").write_text(text)
        return {"text": text}

    store.get(stage, "k" * 8, write)


def file_of(store: Store, stage: str) -> Path:
    return store.root / stage / "kk" / ("k" * 8) / "file"


def judged(store: Store, ledger: Ledger) -> tuple[list[str], list[str], list[str]]:
    pieces = whole(store.root)
    return ledger.lost(pieces), ledger.twice(), ledger.differing(pieces)


def test_as_it_was(made: tuple[Store, Ledger]) -> None:
    assert judged(*made) == ([], [], [])


def test_a_piece_that_went_is_lost_and_made_again_is_made_twice(
    made: tuple[Store, Ledger],
) -> None:
    store, ledger = made
    file_of(store, "score").unlink()
    name = "score/" + "k" * 8
    assert judged(store, ledger) == ([name], [], [name])
    make(store, "score", "1")
    assert judged(store, ledger) == ([], [name], [])


def test_another_result_differs(made: tuple[Store, Ledger]) -> None:
    store, ledger = made
    file_of(store, "meta_lora").unlink()
    make(store, "meta_lora", "2")
    name = "meta_lora/" + "k" * 8
    assert judged(store, ledger) == ([name], [name], [name])


def test_what_the_driver_damaged_may_be_made_again_but_not_differ(
    made: tuple[Store, Ledger],
) -> None:
    store, ledger = made
    for stage in ("tokens", "meta_lora"):
        file_of(store, stage).write_text("x")
        ledger.damage(f"{stage}/" + "k" * 8)
    assert ledger.unfinished(whole(store.root)) == ["meta_lora/" + "k" * 8]
    make(store, "meta_lora", "1")
    # Tokens that nothing asks for stay damaged, and so unused.
    assert judged(store, ledger) == ([], [], [])
    file_of(store, "meta_lora").unlink()
    make(store, "meta_lora", "2")
    name = "meta_lora/" + "k" * 8
    assert judged(store, ledger) == ([], [name], [name])

"""The same benchmark on threads, processes and a Ray cluster of three nodes gives the same results;
a process or a node that is killed in the middle loses nothing that is finished."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.mta import mta
from tasks.report.files import read_run
from tasks.results.store import CHECKPOINTS, MAKING, store
from tests.flows.conftest import folders, records
from tests.ray_nodes import JOB_NODES, RayNodes, installed
from tests.small import SMALL

pytestmark = pytest.mark.slow

# Of these the results are compared: all that is trained, chosen, answered and scored.
STAGES = (
    "prepare", "tiny_model", "anchors", "meta_lora", "bank", "fusion", "stacking", "answers",
    "compare",
)  # fmt: skip


def results(
    monkeypatch: pytest.MonkeyPatch, folder: Path, compute: dict[str, Any]
) -> dict[str, Any]:
    """What a run of its own store gives: the base model's key, the hashes of all that was trained,
    chosen and answered, and the scores."""
    monkeypatch.setenv("MTA_STORE", str(folder / ".mta" / "store"))
    state = mta(**(SMALL | {"compute": compute}), return_state=True)
    assert state.is_completed(), state.message
    (cell,), (key,) = read_run().cells, records(folder, "tiny_model")
    merging = cell.merging("mta")
    assert merging is not None
    return {
        "key": key,
        "base": cell.base.content,
        "anchors": merging.chosen.table.sha256,
        "bank": merging.merged.bank.file.sha256,
        "answers": {one.method: one.predictions.sha256 for one in cell.compared.scored},
        "stacked": [one.stacked and one.stacked.sha256 for one in cell.answers["mta"]],
        "intervals": cell.compared.intervals,
    }  # fmt: skip


@pytest.fixture(scope="module")
def on_threads(
    tmp_path_factory: pytest.TempPathFactory, prefect_server: None, mlflow_tables: Path
) -> dict[str, Any]:
    """What the other runners are held against."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("threads")
        mlflow = shutil.copy(mlflow_tables, folder / "mlflow.db")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlflow}")
        found = results(patch, folder, {"workers": "threads"})
    assert {stage: len(folders(folder, stage)) for stage in STAGES} == {
        "prepare": 1, "tiny_model": 1, "anchors": 1, "meta_lora": 3, "bank": 1, "fusion": 1,
        "stacking": 2, "answers": 6, "compare": 1,
    }  # fmt: skip
    return found


class Killer:
    """Calls `kill` with the pid of the process that trains the base model, once.

    It cannot come too late: where the training would go on from a checkpoint there is a pipe, which
    blocks who opens it until the other end is opened too, here.
    """

    def __init__(self, store: Path, key: str, kill: Callable[[int], Any]) -> None:
        """key: the cache key of the base model."""
        self._killed: list[int] = []
        self._making, self._kill = store / MAKING, kill
        self._pipe = store.parent / CHECKPOINTS / "tiny_model" / f"{key}.safetensors"
        self._pipe.parent.mkdir(parents=True)
        os.mkfifo(self._pipe)
        self._thread = threading.Thread(target=self._strike, daemon=True)
        self._thread.start()

    def killed(self) -> list[int]:
        """Whom it has killed, once a run is over."""
        self._thread.join(60)  # it would still wait for a run that trained nothing
        return self._killed

    def _strike(self) -> None:
        with self._pipe.open("wb", buffering=0):
            # Who trains it again is not to wait.
            self._pipe.unlink()
            (pid,) = {holder(lock) for lock in self._making.glob("*.lock")} - {0, os.getpid()}
            self._kill(pid)
        self._killed.append(pid)


def holder(lock: Path) -> int:
    """The process that holds a lock file, 0 for none: as Linux lists them."""
    inode = str(lock.stat().st_ino) if lock.exists() else ""
    for line in Path("/proc/locks").read_text().splitlines():
        parts = line.split()
        if parts[5].split(":")[-1] == inode:
            return int(parts[4])
    return 0


def test_processes_one_of_them_killed(
    workplace: Path, on_threads: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run fails in one line; started again it goes on from what is finished."""
    before = set(psutil.Process().children(recursive=True))
    killer = Killer(store().root, on_threads["key"], lambda pid: os.kill(pid, 9))
    compute = {"workers": "processes", "max_workers": 2}
    state = mta(**(SMALL | {"compute": compute}), return_state=True)
    assert state.is_failed()
    assert "its process was lost" in (state.message or "")
    assert "\n" not in (state.message or "")
    assert len(killer.killed()) == 1
    assert results(monkeypatch, workplace, compute) == on_threads
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [process for process in left if "spawn_main" in " ".join(process.cmdline())]


@pytest.fixture
def cluster() -> Iterator[RayNodes]:
    if not installed():
        pytest.skip("ray or prefect-ray is not installed (pip install '.[ray]')")
    import ray

    nodes = RayNodes()
    try:
        yield nodes
    finally:
        ray.shutdown()
        nodes.stop()


def test_ray_one_node_killed(
    workplace: Path, on_threads: dict[str, Any], cluster: RayNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = Killer(store().root, on_threads["key"], cluster.kill_with)
    compute = {"runner": "ray", "ray_address": cluster.address}
    assert results(monkeypatch, workplace, compute) == on_threads
    assert len(killer.killed()) == 1
    assert len(cluster) == JOB_NODES - 1

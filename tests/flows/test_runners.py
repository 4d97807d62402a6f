"""The same benchmark on threads, processes and a Ray cluster of three nodes gives the same results;
a process or a node that is killed in the middle changes nothing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.mta import mta
from tests.flows.conftest import records
from tests.ray_nodes import JOB_NODES, RayNodes, installed
from tests.small import SMALL

pytestmark = pytest.mark.slow

# Of these the results are compared: all that is trained, chosen, answered and scored.
STAGES = (
    "prepare", "base_model", "anchors", "meta_lora", "bank", "fusion", "stacking", "predictions",
    "score", "compare",
)  # fmt: skip


def results(
    monkeypatch: pytest.MonkeyPatch, folder: Path, compute: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Per stage and key the hashes of files and of the value: from a store of its own."""
    monkeypatch.setenv("MTA_STORE", str(folder / ".mta" / "store"))
    state = mta(**(SMALL | {"compute": compute}), return_state=True)
    assert state.is_completed(), state.message
    return {
        stage: {
            key: (record["files"], record["value_sha256"])
            for key, record in records(folder, stage).items()
        }
        for stage in STAGES
    }


@pytest.fixture(scope="module")
def on_threads(
    tmp_path_factory: pytest.TempPathFactory, prefect_server: None, mlflow_server: str
) -> dict[str, dict[str, Any]]:
    """What the other runners are held against."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
        found = results(patch, tmp_path_factory.mktemp("threads"), {"workers": "threads"})
    assert {stage: len(keys) for stage, keys in found.items()} == {
        "prepare": 1, "base_model": 1, "anchors": 1, "meta_lora": 3, "bank": 1, "fusion": 1,
        "stacking": 2, "predictions": 6, "score": 3, "compare": 1,
    }  # fmt: skip
    return found


class Killer:
    """Calls `kill` with the pid of the process that trains the base model, once."""

    def __init__(self, store: Path, kill: Callable[[int], Any]) -> None:
        self.killed: list[int] = []
        self._store, self._kill = store, kill
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        for _ in range(2400):
            for work in self._store.glob("base_model/*/.making-*"):
                pid = int(work.name.split("~")[1])
                self._kill(pid)
                self.killed.append(pid)
                return
            time.sleep(0.05)


def test_processes_one_of_them_killed(
    workplace: Path, on_threads: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job under way gets another process; this process ends none of the others."""
    before = set(psutil.Process().children(recursive=True))
    killer = Killer(workplace / ".mta" / "store", lambda pid: os.kill(pid, 9))
    compute = {"workers": "processes", "max_workers": 2}
    assert results(monkeypatch, workplace, compute) == on_threads
    assert len(killer.killed) == 1
    assert killer.killed != [os.getpid()]
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


@pytest.mark.timeout(300)
def test_ray_one_node_killed(
    workplace: Path, on_threads: dict[str, Any], cluster: RayNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = Killer(workplace / ".mta" / "store", cluster.kill_with)
    compute = {"runner": "ray", "ray_address": cluster.address}
    assert results(monkeypatch, workplace, compute) == on_threads
    assert len(killer.killed) == 1
    assert len(cluster) == JOB_NODES - 1

"""What is left of a worker's runs after its end, against a server made of a dictionary."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.local import server as module
from infra.local.processes import PART, jobs
from infra.local.server import UNDER_WAY, PrefectApi, end_worker
from infra.local.settings import WORKER, Layout


class FakeApi(PrefectApi):
    """Flow runs with a state and perhaps a deployment; limits with used slots."""

    def __init__(self, layout: Layout, runs: list[dict[str, Any]]) -> None:
        super().__init__("http://nowhere/api")
        self.layout = layout
        self.runs = {run["id"]: run for run in runs}
        self.slots = {"gpu": 1, "deployment:own": 1, "another's": 1}

    def call(self, method: str, path: str, body: Any = None) -> Any:
        if path.endswith("/set_state"):
            run = self.runs[path.split("/")[-2]]
            run["state_type"] = body["state"]["type"]
            run["message"] = body["state"]["message"]
            return None
        if method == "PATCH":
            self.slots[path.rsplit("/", 1)[-1]] = body["active_slots"]
            return None
        assert path == "/v2/concurrency_limits/filter"
        return [{"id": name, "name": name, "active_slots": n} for name, n in self.slots.items()]

    def rows(self, kind: str, **filters: Any) -> list[dict[str, Any]]:
        if kind == "task_runs":
            return []
        asked = filters["flow_runs"]
        rows = list(self.runs.values())
        if "deployments" in filters:
            rows = [row for row in rows if row.get("deployment") == "d"]
        if "id" in asked:
            rows = [row for row in rows if row["id"] in asked["id"]["any_"]]
        if "next_scheduled_start_time" in asked:
            before = asked["next_scheduled_start_time"]["before_"]
            rows = [row for row in rows if row.get("due", "9999") < before]
        return [row for row in rows if row["state_type"] in asked["state"]["type"]["any_"]]


def run_of(name: str, state: str = "RUNNING", **more: Any) -> dict[str, Any]:
    return {"id": name, "name": name, "state_type": state, **more}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


def leases(layout: Layout) -> list[Path]:
    """Two of them, where Prefect's file lease storage keeps them."""
    folder = layout.prefect_home / "concurrency_leases"
    folder.mkdir(parents=True)
    files = [folder / "lease-1.json", folder / "expirations.json"]
    for file in files:
        file.write_text("{}")
    return files


def test_runs_crash_and_slots_come_back(layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run_of("orphan", deployment="d"), run_of("done", "COMPLETED", deployment="d")]
    api = FakeApi(layout, runs)
    held = leases(layout)
    end_worker(layout, api, "It died.")
    states = {name: run["state_type"] for name, run in api.runs.items()}
    assert states == {"orphan": "CRASHED", "done": "COMPLETED"}
    assert api.runs["orphan"]["message"] == "It died."
    assert api.slots == {"gpu": 0, "deployment:own": 0, "another's": 1}
    assert not any(file.exists() for file in held)
    said = capsys.readouterr().err
    assert said == "mta: flow run 'orphan' had no worker any more: set to CRASHED\n"


def test_a_run_called_by_hand_keeps_its_slot(layout: Layout) -> None:
    api = FakeApi(layout, [run_of("by-hand"), run_of("orphan", deployment="d")])
    held = leases(layout)
    end_worker(layout, api, "It died.")
    assert api.runs["by-hand"]["state_type"] == "RUNNING"
    assert api.runs["orphan"]["state_type"] == "CRASHED"
    assert set(api.slots.values()) == {1}
    assert all(file.exists() for file in held)


def test_a_run_that_just_ended_keeps_its_state_and_its_own_word_for_crashed_does_not(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [run_of("finishes", deployment="d"), run_of("aborted", deployment="d")]
    api = FakeApi(layout, runs)

    def jobs_end(processes: object) -> None:
        runs[0]["state_type"] = "COMPLETED"
        runs[1].update(state_type="CRASHED", message="aborted by exit call")

    monkeypatch.setattr(module, "end", jobs_end)
    end_worker(layout, api, "It died.")
    assert runs[0]["state_type"] == "COMPLETED"
    assert runs[1]["message"] == "It died."


def test_missed_runs_of_the_schedule_are_skipped_and_asked_for_ones_are_not(layout: Layout) -> None:
    late = {"due": "2000-01-02T23:00:00+00:00", "deployment": "d"}
    api = FakeApi(
        layout,
        [
            run_of("sunday", "SCHEDULED", auto_scheduled=True, **late),
            run_of("next-sunday", "SCHEDULED", auto_scheduled=True, deployment="d"),
            run_of("asked-for", "SCHEDULED", auto_scheduled=False, **late),
        ],
    )
    end_worker(layout, api, "It died.")
    assert api.runs["sunday"]["state_type"] == "CANCELLED"
    assert api.runs["next-sunday"]["state_type"] == "SCHEDULED"
    assert api.runs["asked-for"]["state_type"] == "SCHEDULED"


def test_only_jobs_of_this_stack_are_ended(layout: Layout) -> None:
    argv = [sys.executable, "-c", "import time; time.sleep(600)"]

    def job(root: Path) -> subprocess.Popen[bytes]:
        env = {**os.environ, PART: WORKER, "MTA_ROOT": str(root)}
        return subprocess.Popen(argv, env=env)

    ours, theirs = job(layout.root), job(layout.root / "another")
    try:
        while not (found := jobs(layout)):
            time.sleep(0.01)  # the system shows no environment while a program starts
        assert [process.pid for process in found] == [ours.pid]
        end_worker(layout, FakeApi(layout, []), "It died.")
        ours.wait(300)
        assert psutil.pid_exists(theirs.pid)
        assert theirs.poll() is None
    finally:
        for process in (ours, theirs):
            process.kill()
            process.wait()


def test_the_states_that_count_as_under_way() -> None:
    assert set(UNDER_WAY["state"]["type"]["any_"]) == {"RUNNING", "PENDING", "CANCELLING"}

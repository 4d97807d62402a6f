"""What is swept up after a worker, against a server made of a dictionary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.local import sweep as module
from infra.local.api import PrefectApi
from infra.local.settings import Layout
from infra.local.sweep import UNDER_WAY, end_jobs, job_processes, sweep

GPU: dict[str, Any] = {"id": "limit-gpu", "name": "gpu", "limit": 1}
OWN: dict[str, Any] = {"id": "limit-own", "name": "deployment:d", "limit": 1}


class FakeApi(PrefectApi):
    """Flow runs with a state and perhaps a deployment or a parent; limits with used slots."""

    def __init__(self, layout: Layout, runs: list[dict[str, Any]]) -> None:
        super().__init__("http://nowhere/api")
        self.layout = layout
        self.runs = {run["id"]: run for run in runs}
        self.slots = {"limit-gpu": 1, "limit-own": 1}

    def call(self, method: str, path: str, body: Any = None) -> Any:
        last = path.rsplit("/", 1)[-1]
        if path.startswith("/deployments/name/"):
            return {"id": "d", "global_concurrency_limit": OWN}
        if path.endswith("/set_state"):
            run = self.runs[path.split("/")[-2]]
            run["state_type"] = body["state"]["type"]
            run["message"] = body["state"]["message"]
            return None
        if path.startswith("/flow_runs/") and method == "GET":
            return self.runs[last]
        if path.endswith("decrement-with-lease"):
            file = self.layout.leases / f"{body['lease_id']}.json"
            for limit in json.loads(file.read_text())["resource_ids"]:
                self.slots[limit] -= 1
            file.unlink()
            return None
        limit = GPU if last in ("gpu", GPU["id"]) else OWN
        if method == "PATCH":
            self.slots[limit["id"]] = body["active_slots"]
            return None
        return {**limit, "active_slots": self.slots[limit["id"]]}

    def everything(self, path: str, where: dict[str, Any]) -> list[dict[str, Any]]:
        if path.startswith("/task_runs"):
            return []
        asked = where["flow_runs"]
        rows = list(self.runs.values())
        if "deployments" in where:
            rows = [row for row in rows if row.get("deployment") == "d"]
        if "parent_flow_run_id" in asked:
            rows = [r for r in rows if r.get("parent") in asked["parent_flow_run_id"]["any_"]]
        if "next_scheduled_start_time" in asked:
            before = asked["next_scheduled_start_time"]["before_"]
            rows = [row for row in rows if row.get("due", "9999") < before]
        return [row for row in rows if row["state_type"] in asked["state"]["type"]["any_"]]


def run_of(name: str, state: str = "RUNNING", **more: Any) -> dict[str, Any]:
    return {"id": name, "name": name, "state_type": state, **more}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path)
    layout.leases.mkdir(parents=True)
    return layout


def lease(layout: Layout, name: str, limit: str, holder: str | None = None) -> Path:
    metadata: dict[str, Any] = {"slots": 1}
    if holder:
        metadata["holder"] = {"type": "flow_run", "id": holder}
    file = layout.leases / f"{name}.json"
    file.write_text(json.dumps({"id": name, "resource_ids": [limit], "metadata": metadata}))
    return file


def test_runs_and_sub_flows_crash_and_slots_come_back(layout: Layout) -> None:
    api = FakeApi(
        layout,
        [
            run_of("parent", deployment="d"),
            run_of("sub", parent="parent"),
            run_of("done", "COMPLETED", deployment="d"),
        ],
    )
    lease(layout, "lease-1", GPU["id"])
    lease(layout, "lease-2", OWN["id"])
    said: list[str] = []
    sweep(layout, api, said.append, reason="It died.")
    assert {name: run["state_type"] for name, run in api.runs.items()} == {
        "parent": "CRASHED",
        "sub": "CRASHED",
        "done": "COMPLETED",
    }
    assert api.runs["parent"]["message"] == "It died."
    assert api.slots == {"limit-gpu": 0, "limit-own": 0}
    assert list(layout.leases.iterdir()) == []
    assert said == ["flow run 'parent' had no worker any more: set to CRASHED"]


def test_slots_without_a_lease_come_back(layout: Layout) -> None:
    api = FakeApi(layout, [])
    said: list[str] = []
    sweep(layout, api, said.append, reason="It died.")
    assert api.slots == {"limit-gpu": 0, "limit-own": 0}
    assert len(said) == 2


def test_a_run_called_by_hand_keeps_its_slot(layout: Layout) -> None:
    api = FakeApi(layout, [run_of("by-hand"), run_of("orphan", deployment="d")])
    kept = lease(layout, "lease-1", GPU["id"])
    named = lease(layout, "lease-2", OWN["id"], holder="orphan")
    sweep(layout, api, lambda text: None, reason="It died.")
    assert api.runs["by-hand"]["state_type"] == "RUNNING"
    assert api.slots["limit-gpu"] == 1
    assert kept.exists()
    assert not named.exists()


def test_a_run_that_just_ended_keeps_its_state_and_its_own_word_for_crashed_does_not(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [run_of("finishes", deployment="d"), run_of("aborted", deployment="d")]
    api = FakeApi(layout, runs)

    def jobs_end(layout: Layout) -> int:
        runs[0]["state_type"] = "COMPLETED"
        runs[1].update(state_type="CRASHED", message="aborted by exit call")
        return 2

    monkeypatch.setattr(module, "end_jobs", jobs_end)
    sweep(layout, api, lambda text: None, reason="It died.")
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
    sweep(layout, api, lambda text: None, reason="It died.")
    assert api.runs["sunday"]["state_type"] == "CANCELLED"
    assert api.runs["next-sunday"]["state_type"] == "SCHEDULED"
    assert api.runs["asked-for"]["state_type"] == "SCHEDULED"


def test_only_jobs_of_this_stack_are_ended(layout: Layout) -> None:
    argv = [sys.executable, "-c", "import time; time.sleep(60)"]

    def job(root: Path) -> subprocess.Popen[bytes]:
        env = {**os.environ, "PREFECT__FLOW_RUN_ID": "some-run", "MTA_ROOT": str(root)}
        return subprocess.Popen(argv, env=env)

    ours, theirs = job(layout.root), job(layout.root / "another")
    try:
        assert [process.pid for process in job_processes(layout)] == [ours.pid]
        assert end_jobs(layout) == 1
        ours.wait(5)
        assert psutil.pid_exists(theirs.pid)
        assert theirs.poll() is None
    finally:
        for process in (ours, theirs):
            process.kill()
            process.wait()


def test_the_states_that_count_as_under_way() -> None:
    assert set(UNDER_WAY) == {"RUNNING", "PENDING", "CANCELLING"}

"""Flow runs of a forgotten user, out of a real Prefect server."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterName
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from tasks.forget.records import forget_in_prefect


@task(task_run_name="meta-lora-secret-user")
def job() -> None: ...


@flow
def inner() -> None:
    job()


@flow
def outer() -> None:
    inner()


@pytest.mark.slow
@pytest.mark.server
def test_flow_runs_go_with_what_is_below_them() -> None:
    named = TaskRunFilter(name=TaskRunFilterName(any_=["meta-lora-secret-user"]))
    with prefect_test_harness():
        outer()
        with get_client(sync_client=True) as client:
            runs = {run.name: run for run in client.read_flow_runs()}
            assert len(runs) == 2
            (top,) = [str(run.id) for run in runs.values() if run.parent_task_run_id is None]
        unknown = str(uuid4())
        done, left = forget_in_prefect({top, "no-uuid", unknown})
        (line,) = left
        assert line.startswith(f"Prefect: `prefect flow-run delete {unknown}` (unknown to http://")
        assert line.endswith("/api: where it ran, unless it is gone there)")
        assert done == ["Prefect: 2 flow runs removed, with the names and logs of their tasks"]
        with get_client(sync_client=True) as client:
            assert client.read_flow_runs() == []
            assert client.read_task_runs(task_run_filter=named) == []


# In a process of its own: a server that Prefect starts ends with the process.
RUN_ALONE = """
import sys
from pathlib import Path
from flows.local_server import local_server
from tests.unit.forget.test_records import outer
with local_server(Path(sys.argv[1])):
    print(outer(return_state=True).state_details.flow_run_id)
"""


@pytest.mark.slow
@pytest.mark.server
def test_flow_runs_of_a_run_without_the_stack_go_too(tmp_path: Path) -> None:
    """They are in a database of their own, which no server that is set knows of."""
    home = tmp_path / "local"
    command = [sys.executable, "-c", RUN_ALONE, str(home)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    run = ended.stdout.strip().splitlines()[-1]
    assert _rows(home, "flow_run") == 2
    assert _rows(home, "task_run") == 2  # the job, and the sub-flow's own
    # Port 9 takes nothing: the stack's server is down.
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        done, left = forget_in_prefect({run}, [home, tmp_path / "nowhere"])
    assert left == []
    assert done == ["Prefect: 2 flow runs removed, with the names and logs of their tasks"]
    assert _rows(home, "flow_run") == _rows(home, "task_run") == 0


def _rows(home: Path, table: str) -> int:
    with contextlib.closing(sqlite3.connect(home / "prefect.db")) as database:
        return database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def test_an_unreachable_server_is_said_with_the_command() -> None:
    run = str(uuid4())
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        done, left = forget_in_prefect({run})
    assert done == []
    assert left == [f"Prefect: `prefect flow-run delete {run}` (not reached)"]
    assert forget_in_prefect({"local"}) == ([], [])

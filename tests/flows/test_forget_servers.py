"""Flow runs of a forgotten user, out of a real Prefect server."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterName,
)
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.forget.servers import forget_in_prefect


@task(task_run_name="meta-lora-secret-user")
def job() -> None: ...


@flow
def outer() -> None:
    job()


@pytest.mark.slow
@pytest.mark.server
def test_flow_runs_go_with_their_task_runs(prefect_server: None) -> None:
    named = TaskRunFilter(name=TaskRunFilterName(any_=["meta-lora-secret-user"]))
    state = outer(return_state=True)
    run, unknown = str(state.state_details.flow_run_id), str(uuid4())
    only = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    with get_client(sync_client=True) as client:
        # It reaches the server as an event, a moment after it has ended.
        for _ in range(3000):
            if client.read_task_runs(task_run_filter=named, flow_run_filter=only):
                break
            time.sleep(0.1)
        assert client.read_task_runs(task_run_filter=named)
        done, left = forget_in_prefect({run, unknown})
        (line,) = left
        assert line.startswith(f"Prefect: `prefect flow-run delete {unknown}` where it ran, ")
        assert "(unknown to http://" in line
        assert done == ["Prefect: 1 flow runs removed, with the names and logs of their tasks"]
        assert client.read_flow_runs(flow_run_filter=only) == []
        assert client.read_task_runs(task_run_filter=named) == []


# In a process of its own: a server that Prefect starts ends with the process.
RUN_ALONE = """
import sys
from pathlib import Path
from infra.local.alone import local_server
from tests.flows.test_forget_servers import outer
with local_server(Path(sys.argv[1])):
    print(outer(return_state=True).state_details.flow_run_id)
"""


@pytest.mark.slow
@pytest.mark.server
def test_flow_runs_of_a_run_without_the_stack_go_too(tmp_path: Path, prefect_tables: Path) -> None:
    """They are in a database of their own, which no server that is set knows of."""
    home = tmp_path / "local"
    home.mkdir()
    shutil.copy(prefect_tables, home / "prefect.db")
    command = [sys.executable, "-c", RUN_ALONE, str(home)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    run = ended.stdout.strip().splitlines()[-1]
    assert _rows(home, "flow_run") == _rows(home, "task_run") == 1
    # Port 9 takes nothing: the stack's server is down.
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        done, left = forget_in_prefect({run}, [home, tmp_path / "nowhere"])
    assert left == []
    assert done == ["Prefect: 1 flow runs removed, with the names and logs of their tasks"]
    assert _rows(home, "flow_run") == _rows(home, "task_run") == 0


def _rows(home: Path, table: str) -> int:
    with contextlib.closing(sqlite3.connect(home / "prefect.db")) as database:
        return database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def test_without_a_server_the_command_is_said() -> None:
    run = str(uuid4())
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        done, left = forget_in_prefect({run})
    assert done == []
    said = f"`prefect flow-run delete {run}` where it ran, unless it is gone there"
    assert left == [f"Prefect: {said} (no server is set)"]
    assert forget_in_prefect(set()) == ([], [])


def test_a_server_that_does_not_answer_is_named_without_its_password() -> None:
    run = str(uuid4())
    # Port 9 takes nothing.
    with temporary_settings({PREFECT_API_URL: "http://me:secret@127.0.0.1:9/api"}):
        _, (line,) = forget_in_prefect({run})
    assert "(http://***@127.0.0.1:9/api not reached (" in line

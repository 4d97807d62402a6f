"""Flow runs of a forgotten user, out of a real Prefect server."""

from __future__ import annotations

from uuid import uuid4

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterName
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from tasks.forget_records import forget_in_prefect


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
        done, left = forget_in_prefect({top, "no-uuid", str(uuid4())})
        assert left == []
        assert done == ["Prefect: 2 flow runs removed, with the names and logs of their tasks"]
        with get_client(sync_client=True) as client:
            assert client.read_flow_runs() == []
            assert client.read_task_runs(task_run_filter=named) == []


def test_an_unreachable_server_is_said_with_the_command() -> None:
    run = str(uuid4())
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        done, left = forget_in_prefect({run})
    assert done == []
    assert left == [f"Prefect: `prefect flow-run delete {run}` (not reached)"]
    assert forget_in_prefect({"local"}) == ([], [])

"""Runs while MLflow is not there, is killed in the middle and started again, or left alone."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from mlflow import MlflowClient
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.states import Completed, Running

from tasks.results.run import Run
from tasks.tracking.runs import flow_run_is_over, log_ended, log_run, tracked
from tasks.tracking.server import Mlflow
from tests.flows.conftest import MlflowServer
from tests.unit.tracking.logged import logged, named
from tests.unit.tracking.run_case import NAME, begun, ended_run, stub_report

ANCHORS = 12


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of the test's own, and tables that are stubs."""
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "mta" / "store"))
    stub_report(monkeypatch)


@pytest.fixture
def server(
    tmp_path: Path, mlflow_tables: Path, stored: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MlflowServer]:
    """One that does not run yet."""
    (tmp_path / "mlflow").mkdir()
    made = MlflowServer(tmp_path / "mlflow", mlflow_tables)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.address)
    yield made
    made.end(signal.SIGKILL)


@pytest.fixture
def at_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Have something happen just before the n-th batch of values that is logged from now on."""
    real, events, count = MlflowClient.log_batch, {}, [0]

    def log_batch(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if event := events.pop(count[0], None):
            event()
        return real(self, *args, **kwargs)

    def at(number: int, event: Callable[[], None]) -> None:
        events[count[0] + number] = event

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    return at


def whole_run(run: Run) -> str:
    """A run from its beginning to its end; what it says of MLflow."""
    with tracked(begun(run)):
        return log_ended(run)


def test_everything_is_there_once(
    server: MlflowServer,
    at_batch: Callable[[int, Callable[[], None]], None],
    tmp_path: Path,
    mlflow_tables: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = ended_run(anchors=ANCHORS)
    assert "`mta log spry-llama` logs the run" in whole_run(run)

    server.start()
    at_batch(7, lambda: server.end(signal.SIGKILL))
    said = whole_run(run)
    assert "; MLflow did not take all of it (" in said
    server.start()
    left = named(server.address)
    assert left[NAME].info.status == "RUNNING"
    assert 2 < len(left) < 1 + ANCHORS + 3

    # Killed and started again between two of its calls: the pool's other threads lose answers.
    at_batch(5, lambda: kill_and_start(server))
    run_id = None
    for _ in range(3):
        try:
            run_id = log_run(run, Mlflow(server.address))
            break
        except Exception:
            continue
    assert run_id == left[NAME].info.run_id
    disturbed = logged(server.address)
    assert len(disturbed) == 1 + ANCHORS + 3
    assert {held["status"] for held in disturbed.values()} == {"FINISHED"}
    ids = {name: one.info.run_id for name, one in named(server.address).items()}
    assert log_run(run, Mlflow(server.address)) == run_id
    assert {name: one.info.run_id for name, one in named(server.address).items()} == ids
    assert logged(server.address) == disturbed

    parent = named(server.address)[NAME]
    ran, came_out, ways = parent.data.tags["mlflow.note.content"].split("\n\n")
    assert (ran, came_out) == run.summary
    page = f"{server.address}/#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}"
    assert f"[report]({page}/artifacts/report.html), [methods]({server.address}/#/" in ways

    # One that nothing happens to, in an MLflow of its own, which is a file.
    calm = f"sqlite:///{shutil.copy(mlflow_tables, tmp_path / 'calm.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", calm)
    assert whole_run(run) == ""
    assert logged(calm) == disturbed


def kill_and_start(server: MlflowServer) -> None:
    server.end(signal.SIGKILL)
    server.start()


def test_the_page_is_known_when_the_run_begins(
    stored: None, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    with tracked(begun(ended_run())) as page:
        assert page is not None
        assert page.startswith(f"{mlflow_server}/#/experiments/")


def test_whether_a_flow_run_is_over(prefect_server: None) -> None:
    @flow
    def empty() -> None: ...

    with get_client(sync_client=True) as client:
        going, over = (client.create_flow_run(empty, state=s) for s in (Running(), Completed()))
    assert not flow_run_is_over(str(going.id))
    assert flow_run_is_over(str(over.id))
    # It may be another server's.
    assert not flow_run_is_over(str(uuid4()))
    assert not flow_run_is_over("local")

"""Runs while MLflow is not there, is killed in the middle and started again, or dies at the end."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from flows.mta import mta
from tasks.tracking.__main__ import main
from tasks.tracking.replay import Replay
from tasks.tracking.spool import Spool, waiting
from tests.flows.conftest import MlflowServer
from tests.small import SMALL

# An entry of this kind and number within a run is at which something happens to MLflow.
Events = dict[int, Callable[[], None]]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    """One that does not run yet."""
    (tmp_path / "mlflow").mkdir()
    made = MlflowServer(tmp_path / "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.address)
    yield made
    made.end(signal.SIGKILL)


def kill(server: MlflowServer) -> None:
    server.end(signal.SIGKILL)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """What happens just before the n-th entry of a run is added."""
    found: Events = {}
    count = {"entries": 0}
    real = Spool.add

    def add(self: Spool, kind: str, key: str, **fields: Any) -> None:
        count["entries"] = 1 if kind == "run" and fields["parent"] is None else count["entries"] + 1
        if event := found.pop(count["entries"], None):
            event()
        real(self, kind, key, **fields)

    monkeypatch.setattr(Spool, "add", add)
    return found


def after(number: int, event: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """`event` when MLflow has taken the n-th entry and nobody has heard of it."""
    real, count = Replay.take, [0]

    def take(self: Replay, entry: dict[str, Any], folder: Path, anew: bool) -> None:
        real(self, entry, folder, anew)
        count[0] += 1
        if count[0] == number:
            event()
            raise ConnectionResetError(104, "Connection reset by peer")

    patch.setattr(Replay, "take", take)


def dump(address: str) -> list[dict[str, Any]]:
    """Per parent run, oldest first: what it and its children hold, but for ids and times."""
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("mta")
    assert experiment is not None
    every = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    parents = [run for run in every if run.data.tags["kind"] == "benchmark"]
    found = []
    for parent in parents:
        own = parent.info.run_id
        children = [run for run in every if run.data.tags.get("mlflow.parentRunId") == own]
        held = {"parent": _content(client, parent)}
        assert len({run.info.run_name for run in children}) == len(children)  # once
        held |= {run.info.run_name: _content(client, run) for run in children}
        found.append(held)
    assert sum(len(held) for held in found) == len(every)
    return found


def _content(client: MlflowClient, run: Any) -> dict[str, Any]:
    series = {
        name: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))
        for name in run.data.metrics
    }
    files = sorted(_files(client, run.info.run_id))
    return {"status": run.info.status, "params": run.data.params, "metrics": series, "files": files}


def _files(client: MlflowClient, run: str, folder: str | None = None) -> list[str]:
    found: list[str] = []
    for item in client.list_artifacts(run, folder):
        found += _files(client, run, item.path) if item.is_dir else [item.path]
    return found


def test_everything_is_there_once(
    workplace: Path, server: MlflowServer, events: Events, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four runs: MLflow absent; killed twice in the middle; dead at the end; and left alone.

    Only the first trains; each logs all of it.
    """
    state = workplace / ".mta"
    first = mta(**SMALL, return_state=True)
    assert first.is_completed(), first.message
    note = f"MLflow at {server.address} is behind ("
    assert note in (first.message or "")
    assert "`python -m tasks.tracking`" in (first.message or "")
    assert f"note: {note}" in (state / "last_comparison.txt").read_text()
    assert "is behind (" in (state / "report.html").read_text()
    count = sum(
        len(json.loads(path.read_text())) for path in (state / "spool").glob("*/[0-9]*.json")
    )
    assert count > 30

    server.start()
    events |= {8: lambda: kill(server), 20: server.start}
    with pytest.MonkeyPatch.context() as patch:
        # The whole of the first run, and then some of the second: an answer that is lost.
        after(count + 3, lambda: kill_and_start(server), patch)
        second = mta(**SMALL, return_state=True)
    assert events == {}
    assert second.is_completed(), second.message
    assert "is behind (" not in (second.message or "")
    assert waiting(state) == {}

    events[30] = lambda: kill(server)
    third = mta(**SMALL, return_state=True)
    assert third.is_completed(), third.message
    assert note in (third.message or "")
    assert main([]) == 1  # it is still down
    capsys.readouterr()
    server.start()
    assert main([]) == 0
    out = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mta: run ")]
    assert len(out) == 1
    assert out[0].endswith(" logged, 0 wait")
    assert not list((state / "spool").glob("*"))

    fourth = mta(**SMALL, return_state=True)
    assert fourth.is_completed(), fourth.message
    found = dump(server.address)
    assert len(found) == 4
    calm = found[-1]
    assert len(calm) == 1 + 3 + 3
    assert {held["status"] for held in calm.values()} == {"FINISHED"}
    assert all(held["metrics"] for held in calm.values())
    assert {"comparison.txt", "report.html", "config.json"} <= set(calm["parent"]["files"])
    for disturbed in found[:-1]:
        assert disturbed == calm


def kill_and_start(server: MlflowServer) -> None:
    kill(server)
    server.start()

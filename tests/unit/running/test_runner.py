"""Which runner a configuration gets, and that no cache key depends on it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.settings import PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

from tasks.config.run import resolve
from tasks.errors import InputError
from tasks.results.stage import RUNNER
from tasks.running import runner, slots
from tasks.running.slots import ON_RAY, gpu_slot


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine of four cores; what the server was asked for is in `asked`."""
    seen: dict[str, Any] = {"gpu": False, "slots": 4, "asked": None}

    def gpu_slots(otherwise: int) -> int:
        seen["asked"] = otherwise
        slots: int = seen["slots"]
        return slots

    monkeypatch.setattr(runner, "gpu_slots", gpu_slots)
    monkeypatch.setattr(runner, "cpu_jobs", lambda: 4)
    monkeypatch.setattr(runner, "device_of", lambda _options: "cuda" if seen["gpu"] else "cpu")
    return seen


@pytest.mark.parametrize(
    ("given", "gpu", "slots", "kind", "count", "asked"),
    [
        ({}, False, 4, ProcessPoolTaskRunner, 4, 4),
        ({}, True, 2, ThreadPoolTaskRunner, 2, 1),
        ({"model": "/m"}, False, 4, ThreadPoolTaskRunner, 1, 4),
        ({"model": "/m"}, True, 2, ThreadPoolTaskRunner, 2, 1),
        ({"compute": {"workers": "threads"}}, False, 3, ThreadPoolTaskRunner, 3, 4),
        (
            {"compute": {"workers": "processes", "max_workers": 2}},
            True,
            1,
            ProcessPoolTaskRunner,
            2,
            1,
        ),
    ],
)
def test_kind_and_number_of_workers(
    machine: dict[str, Any], given: Any, gpu: bool, slots: int, kind: Any, count: int, asked: int
) -> None:
    machine |= {"gpu": gpu, "slots": slots}
    config = resolve(given)
    with runner.running(config):
        chosen = RUNNER.get()
        # A worker asks the server for nothing before its job (tests/flows/test_stage.py).
        assert not PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED.value()
    # Runners of one kind are equal where they have as many workers.
    assert type(chosen) is kind
    assert chosen == kind(max_workers=count)
    assert RUNNER.get() is None
    assert runner.side_by_side(config) == count
    assert machine["asked"] == asked


def test_lamp_tasks_at_once(machine: dict[str, Any]) -> None:
    assert runner.side_by_side(resolve({"compute": {"side_by_side": 3}})) == 3
    on_ray = {"compute": {"runner": "ray"}, "lamp_tasks": ["LaMP-3", "LaMP-4"], "seeds": [1, 2]}
    assert runner.side_by_side(resolve(on_ray)) == 4


def test_on_ray_folders_of_models_are_whole_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    given = {"model": "model", "anchors": {"text_model": "org/name"}}
    here = resolve(given)
    assert runner.everywhere(here) == here
    there = runner.everywhere(resolve(given | {"compute": {"runner": "ray"}}))
    assert there.base.model == str(tmp_path / "model")
    assert there.anchors.text_model == "org/name"
    file = runner.everywhere(resolve({"model": "a.gguf", "compute": {"runner": "ray"}}))
    assert file.base.model == str(tmp_path / "a.gguf")


def test_on_ray_no_slot_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("a slot was asked for")

    monkeypatch.setattr(slots, "concurrency", asked)
    # Outside a task run none is asked for anyway.
    with gpu_slot():
        pass
    monkeypatch.setattr(slots, "TaskRunContext", SimpleNamespace(get=object))
    monkeypatch.setenv(ON_RAY, "1")
    with gpu_slot():
        pass
    monkeypatch.delenv(ON_RAY)
    with pytest.raises(AssertionError, match="a slot was asked for"), gpu_slot():
        pass


def test_ray_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tasks.running.ray_runner", None)
    config = resolve({"compute": {"runner": "ray"}})
    with pytest.raises(InputError, match=r"^compute\.runner ray: .*is not installed") as caught:
        runner.running(config).__enter__()
    assert "\n" not in str(caught.value)


def test_workers_of_ray_are_told_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prefect_ray", reason="pip install '.[ray]'")
    from tasks.running.ray_runner import runtime_env

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@host:5000")
    monkeypatch.setenv("MTA_STORE", "relative/store")
    told = runtime_env()["env_vars"]
    # Workers do not talk to MLflow.
    assert "MLFLOW_TRACKING_URI" not in told
    assert told["MTA_STORE"] == str(Path("relative/store").absolute())
    monkeypatch.setenv("MTA_STORE", "s3://mta/store")
    assert runtime_env()["env_vars"]["MTA_STORE"] == "s3://mta/store"
    monkeypatch.setenv("MTA_STORE", "sftp://user:secret@host/store")
    with pytest.raises(InputError, match=r"^MTA_STORE: it holds a password") as caught:
        runtime_env()
    assert "secret" not in str(caught.value)

"""A real Prefect server and a real MLflow server on sqlite, for the flow tests."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.local.alone import OWNER
from infra.local.processes import end, family
from tests.small import SMALL


@pytest.fixture(scope="session")
def prefect_server(prefect_tables: Path) -> None:
    """A real Prefect server, and the only one of a process: Prefect asks the first that it met for
    slots ever after, and gives them back to the one that is set."""


@pytest.fixture(autouse=True)
def end_own_servers() -> Iterator[None]:
    """End what a command started for its process: it would run until pytest itself ends."""
    yield
    end(family(**{OWNER: str(os.getpid())}))


class MlflowServer:
    """An MLflow server with a sqlite store and an artifact folder of its own, and one port."""

    def __init__(self, folder: Path, tables: Path) -> None:
        """tables: the database to begin with (`mlflow_tables`)."""
        shutil.copy(tables, folder / "mlflow.db")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.address = folder, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """It answers when this returns."""
        self.process = _mlflow(self.folder, self.port)
        for _ in range(6000):
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=2)
                return
            except OSError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.1)

    def end(self, how: int = 15) -> None:
        if self.process:
            os.killpg(self.process.pid, how)
            self.process.wait(300)
            self.process = None


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, mlflow_tables: Path) -> Iterator[str]:
    """The address of a server for all tests."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"), mlflow_tables)
    try:
        server.start()
        yield server.address
    finally:
        server.end()


def _mlflow(folder: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--serve-artifacts"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    env = os.environ | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            command, env=env, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )


@pytest.fixture
def mlflow_file(tmp_path: Path, mlflow_tables: Path) -> str:
    """The address of an MLflow of the test's own that is a file: no server, and as real."""
    return f"sqlite:///{shutil.copy(mlflow_tables, tmp_path / 'mlflow.db')}"


@pytest.fixture
def workplace(
    request: pytest.FixtureRequest, tmp_path: Path, prefect_server: None, mlflow_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:  # fmt: skip
    """A store of the test's own, Prefect's server, and MLflow: its server where the test names it,
    else a file."""
    server = "mlflow_server" in request.fixturenames
    address = request.getfixturevalue("mlflow_server") if server else mlflow_file
    monkeypatch.setenv("MTA_STORE", str(tmp_path / ".mta" / "store"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return tmp_path


def records(workplace: Path, stage: str) -> dict[str, dict[str, Any]]:
    """Every result of a stage that is kept: cache key -> its fields, as JSON."""
    found = {}
    for path in (workplace / ".mta" / "store" / "results").glob(f"{stage}-*"):
        result = json.loads(json.loads(path.read_text())["result"])
        found[path.name] = result["data"]
    return found


def folders(workplace: Path, stage: str) -> list[Path]:
    """What a stage wrote: a folder each."""
    return sorted((workplace / ".mta" / "store" / stage).glob("*/*"))


def write_world(folder: Path, **options: Any) -> Path:
    """The users of the small generated world, as files that a run can be given."""
    from tasks.lamp.options import SyntheticOptions
    from tasks.lamp.synthetic import World

    World("LaMP-2M", SyntheticOptions(**(SMALL["synthetic"] | options)), 0).write(folder)
    return folder

"""The ways to run the benchmark, as a user would: by itself, and on the stack.

Each runs a copy of the project in a folder of its own, on free ports, with all state in its `.mta`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from infra.local.processes import Service, family, free_port, jobs
from infra.local.server import PrefectApi
from infra.local.settings import DEPLOYMENT, HOST, MLFLOW, SERVER, WORKER, Layout, StackError

ROOT = Path(__file__).resolve().parents[2]
# What another process compiles just now.
HALF_COMPILED = shutil.ignore_patterns("*.pyc.*")
FINAL_STATES = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
UP_SECONDS = 600


class FaultError(Exception):
    """The driver cannot go on: what a user would have had to sit through, in one line."""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    completed: bool
    message: str


def copy_project(folder: Path) -> Layout:
    """The project's code in `folder`; as it was compiled, where it was."""
    folder.mkdir(parents=True)
    for name in ("flows", "tasks", "infra"):
        shutil.copytree(ROOT / name, folder / name, ignore=HALF_COMPILED)
    shutil.copy(ROOT / "prefect.yaml", folder)
    layout = Layout(folder)
    layout.make()
    return layout


def environment() -> dict[str, str]:
    """That of a plain shell with the environment active, on free ports."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "MTA_"))
    }
    first = free_port()
    return kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PREFECT_PORT": str(first),
        "MLFLOW_PORT": str(free_port(first + 1)),
        "OMP_NUM_THREADS": "1",
    }


class Way(ABC):
    """How a run is started, how it is asked for its end, and which processes it has."""

    name: str

    def __init__(self, layout: Layout, env: dict[str, str], sections: Mapping[str, Any]) -> None:
        self.layout, self.env, self.sections = layout, env, sections

    @abstractmethod
    def begin(self) -> None:
        """Start what does not run, and a run."""

    @abstractmethod
    def outcome(self) -> Ended | None:
        """How the run ended; None while it is under way."""

    @abstractmethod
    def started(self) -> bool:
        """Whether the run has begun its work."""

    @abstractmethod
    def process(self, what: str) -> psutil.Process | None:
        """The process called worker, job, server or mlflow."""

    @abstractmethod
    def stop(self) -> None:
        """End everything."""

    @abstractmethod
    def mend(self) -> None:
        """Start again what a user would after a look at `make status`."""


class Alone(Way):
    """`python -m flows.mta`: no worker, a Prefect server of the run's own, MLflow in sqlite."""

    name = "alone"
    run: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        given = [part for k, v in self.sections.items() for part in ("-p", f"{k}={json.dumps(v)}")]
        self.log = self.layout.logs / "alone.log"
        self.before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.run = subprocess.Popen(
                [sys.executable, "-m", "flows.mta", *given],
                cwd=self.layout.root, env=self.env | {"MTA_ROOT": str(self.layout.root)},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def mend(self) -> None:
        pass  # it starts all it needs by itself

    def outcome(self) -> Ended | None:
        code = self.run.poll() if self.run else None
        if code is None:
            return None
        lines = self._said().splitlines()
        said = next((line for line in reversed(lines) if line.startswith("mta: ")), "")
        return Ended(code == 0, f"exit code {code} {said}".strip())

    def started(self) -> bool:
        # Before, it starts its server.
        return "Beginning flow run" in self._said()

    def process(self, what: str) -> psutil.Process | None:
        if what != "job" or self.run is None or self.run.poll() is not None:
            return None
        return psutil.Process(self.run.pid)

    def _said(self) -> str:
        """The log of this run alone."""
        return self.log.read_bytes()[self.before :].decode(errors="replace")

    def stop(self) -> None:
        """The run, and servers of killed runs."""
        for process in family(MTA_ROOT=str(self.layout.root)):
            with suppress(psutil.Error):
                process.kill()
        if self.run is not None:
            self.run.wait(60)


class OnStack(Way):
    """`make up`, then the deployment."""

    name = "stack"
    run_id: str

    def begin(self) -> None:
        self.mend()
        api = self._api()
        deployment = api.call("GET", f"/deployments/name/{DEPLOYMENT}")
        body = {"parameters": self.sections, "state": {"type": "SCHEDULED"}}
        made = api.call("POST", f"/deployments/{deployment['id']}/create_flow_run", body)
        self.run_id = made["id"]

    def mend(self) -> None:
        done = self._infra("up")
        if done.returncode:
            raise FaultError(f"make up: {' '.join(done.stderr.split())[-400:]}")

    def outcome(self) -> Ended | None:
        try:
            state = self._api().call("GET", f"/flow_runs/{self.run_id}")["state"]
        except StackError:
            return None  # the server starts
        if state["type"] not in FINAL_STATES:
            return None
        message = f"{state['name']}: {' '.join((state['message'] or '').split())}"
        return Ended(state["type"] == "COMPLETED", message)

    def started(self) -> bool:
        return self.process("job") is not None

    def process(self, what: str) -> psutil.Process | None:
        if what == "job":
            running = jobs(self.layout)
            pids = {process.pid for process in running}
            with suppress(psutil.Error):
                return next((one for one in running if one.ppid() not in pids), None)
            return None
        name = {"worker": WORKER, "server": SERVER, "mlflow": MLFLOW}[what]
        service = Service.load(self.layout, name)
        return service.process() if service else None

    def stop(self) -> None:
        self._infra("down")

    def _infra(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "infra.local", command],
            cwd=self.layout.root, env=self.env, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=UP_SECONDS, check=False,
        )  # fmt: skip

    def _api(self) -> PrefectApi:
        service = Service.load(self.layout, SERVER)
        if service is None:
            raise StackError("there is no server")
        return PrefectApi(f"http://{HOST}:{service.port}/api")


def wait(way: Way, seconds: float) -> Ended | None:
    """Wait for a run's end, for so long."""
    limit = time.monotonic() + seconds
    while (ended := way.outcome()) is None and time.monotonic() < limit:
        time.sleep(0.2)
    return ended

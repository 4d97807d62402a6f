"""The ways to run the benchmark, as a user would: on the stack, by itself, and on Ray.

Each runs a copy of the project in a folder of its own, on free ports, with the store in
`<folder>/.mta/store`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from infra.local.api import PrefectApi
from infra.local.processes import Record
from infra.local.settings import DEPLOYMENT, HOST, Layout, StackError
from infra.local.stack import MLFLOW, SERVER, WORKER_PROCESS
from infra.local.sweep import job_processes
from tests.ray_nodes import ENVIRONMENT, RayNodes

ROOT = Path(__file__).resolve().parents[2]
FINAL_STATES = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
UP_SECONDS = 240
# Set in a mount namespace of the driver's own (__main__.py).
INSIDE = "MTA_FAULTS_NAMESPACE"
# A store of some megabytes, so that filling it is quick.
STORE_BYTES = 16 << 20


class FaultError(Exception):
    """The driver cannot go on: what a user would have had to sit through, in one line."""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    completed: bool
    message: str


def copy_project(folder: Path) -> Layout:
    """The project's code in `folder`; its store on a tmpfs of its own where one may be mounted."""
    folder.mkdir(parents=True)
    for name in ("flows", "tasks", "infra"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "prefect.yaml", folder)
    layout = Layout(folder)
    layout.make()
    return layout


def mount_store(layout: Layout) -> bool:
    """Put the store on a small tmpfs; False where this may not be done, or would be seen by all."""
    if INSIDE not in os.environ:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={STORE_BYTES}", "mta", str(layout.store)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def environment(journal: Path) -> dict[str, str]:
    """That of a plain shell with the environment active, on free ports."""
    bin_folder = str(Path(sys.executable).parent)
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "MTA_"))
    }
    first, second = _free_ports()
    return kept | {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}",
        "PREFECT_PORT": str(first),
        "MLFLOW_PORT": str(second),
        "MTA_JOURNAL": str(journal),
        "OMP_NUM_THREADS": "1",
    }


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        one.bind((HOST, 0))
        two.bind((HOST, 0))
        return one.getsockname()[1], two.getsockname()[1]


def _parent(process: psutil.Process) -> int:
    try:
        return int(process.ppid())
    except psutil.Error:
        return 0


class Way(ABC):
    """How a run is started, how it is asked for its end, and which processes it has."""

    name: str

    def __init__(self, layout: Layout, env: dict[str, str], sections: dict[str, Any]) -> None:
        self.layout, self.env, self.sections = layout, env, sections

    @abstractmethod
    def begin(self) -> None:
        """Start what does not run, and a run."""

    @abstractmethod
    def mend(self) -> None:
        """Start again what a user would after a look at `make status`."""

    @abstractmethod
    def outcome(self) -> Ended | None:
        """How the run ended; None while it is under way."""

    @abstractmethod
    def started(self) -> bool:
        """Whether the run's process is there."""

    @abstractmethod
    def process(self, what: str) -> psutil.Process | None:
        """The process called worker, job, server or mlflow."""

    @abstractmethod
    def stop(self) -> None:
        """End everything."""

    def node(self, _number: int) -> int | None:
        """Kill a node that runs jobs; its pid."""
        return None

    def wait(self, seconds: float) -> Ended | None:
        """Wait for the end, for so long."""
        limit = time.monotonic() + seconds
        while (ended := self.outcome()) is None and time.monotonic() < limit:
            time.sleep(0.2)
        return ended


class OnStack(Way):
    """`make up`, then the deployment."""

    name = "stack"
    run_id: str

    def begin(self) -> None:
        self.mend()
        api = self._api()
        deployment = api.call("GET", f"/deployments/name/{DEPLOYMENT}")
        body = {"parameters": self.sections, "state": {"type": "SCHEDULED"}}
        self.run_id = api.call("POST", f"/deployments/{deployment['id']}/create_flow_run", body)[
            "id"
        ]

    def mend(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "infra.local", "up"],
            cwd=self.layout.root, env=self.env, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=UP_SECONDS, check=False,
        )  # fmt: skip
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
            jobs = {process.pid: process for process in job_processes(self.layout)}
            return next((one for one in jobs.values() if _parent(one) not in jobs), None)
        name = {"worker": WORKER_PROCESS, "server": SERVER, "mlflow": MLFLOW}[what]
        record = Record.load(self.layout.run, name)
        return record.process() if record else None

    def stop(self) -> None:
        subprocess.run(
            [sys.executable, "-m", "infra.local", "down"],
            cwd=self.layout.root, env=self.env, stdin=subprocess.DEVNULL,
            capture_output=True, timeout=UP_SECONDS, check=False,
        )  # fmt: skip

    def _api(self) -> PrefectApi:
        record = Record.load(self.layout.run, SERVER)
        if record is None:
            raise StackError("there is no server")
        return PrefectApi(f"http://{HOST}:{record.port}/api")


class Alone(Way):
    """`python -m flows.mta`: no worker, a Prefect server of the run's own, MLflow in sqlite."""

    name = "alone"

    def __init__(self, layout: Layout, env: dict[str, str], sections: dict[str, Any]) -> None:
        super().__init__(layout, env, sections)
        self.log = layout.logs / "alone.log"
        self.run: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        sections = self.sections | {"compute": self.compute()}
        given = [part for k, v in sections.items() for part in ("-p", f"{k}={json.dumps(v)}")]
        self.before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.run = subprocess.Popen(
                [sys.executable, "-m", "flows.mta", *given],
                cwd=self.layout.root, env=self.env | {"MTA_ROOT": str(self.layout.root)},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def compute(self) -> dict[str, Any]:
        """Where jobs run."""
        own: dict[str, Any] = self.sections["compute"]
        return own

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
        # From here on it does what it is for; before, it starts its server.
        return "Beginning flow run" in self._said()

    def process(self, what: str) -> psutil.Process | None:
        if what != "job" or self.run is None or self.run.poll() is not None:
            return None
        return psutil.Process(self.run.pid)

    def _said(self) -> str:
        """The log of this run alone."""
        return self.log.read_bytes()[self.before :].decode(errors="replace")

    def stop(self) -> None:
        """The run, and servers of killed runs: both are in a session that was made for them."""
        for process in psutil.process_iter():
            try:
                if process.environ().get("MTA_ROOT") == str(self.layout.root):
                    process.send_signal(signal.SIGKILL)
            except (psutil.Error, OSError):
                continue
        if self.run is not None:
            self.run.wait(10)


class OnRay(Alone):
    """`python -m flows.mta`, its jobs on a Ray cluster, whose nodes inherit what is in `env`."""

    name = "ray"
    nodes: RayNodes | None = None

    def __init__(self, layout: Layout, env: dict[str, str], sections: dict[str, Any]) -> None:
        super().__init__(layout, env | ENVIRONMENT, sections)

    def begin(self) -> None:
        if self.nodes is None:
            self.nodes = RayNodes(self.env)
        super().begin()

    def compute(self) -> dict[str, Any]:
        assert self.nodes is not None
        return super().compute() | {"runner": "ray", "ray_address": self.nodes.address}

    def node(self, number: int) -> int | None:
        return self.nodes.kill(number) if self.nodes is not None else None

    def mend(self) -> None:
        if self.nodes is not None:
            self.nodes.complete()

    def rest(self) -> None:
        """End the nodes; the next run starts others."""
        if self.nodes is not None:
            self.nodes.stop()
            self.nodes = None

    def stop(self) -> None:
        super().stop()
        self.rest()

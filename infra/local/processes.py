"""Processes that outlive the command that started them: start, recognise, wait for, end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil
from pydantic import BaseModel, ValidationError

from infra.command import say
from infra.local.settings import HOST, WORKER, Layout, StackError
from tasks.files import locked, write_atomic

# The variable with the name of the started process that a process belongs to.
PART = "MTA_PART"
# The signals that end a process, and the seconds to wait after each. A Prefect worker takes the
# first SIGTERM as "finish what you are doing", and only the second as "now".
SIGNALS = ((signal.SIGTERM, 3.0), (signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0))
START_SECONDS, LOOK_SECONDS = 180.0, 0.2
# Two readings of one start may differ by so much, if the clock is set between them.
SAME_START_SECONDS = 5
# Variables that change how a run behaves. If one changes, a new worker is needed.
TELLING = ("CUDA_", "HF_", "MLFLOW_", "MTA_", "OMP_", "PREFECT_", "TOKENIZERS_", "TORCH")


class Service(BaseModel, frozen=True):
    """One started process, in `.mta/run/<name>.json`; its children inherit PART."""

    name: str
    pid: int
    create_time: float  # seconds since 1970
    port: int  # 0: it has none
    log: Path = Path()

    @classmethod
    def load(cls, layout: Layout, name: str) -> Service | None:
        """The process as it was saved; None if there is no file, or no whole one."""
        try:
            return cls.model_validate_json((layout.run / f"{name}.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def save(self, layout: Layout) -> None:
        write_atomic(layout.run / f"{self.name}.json", self.model_dump_json(indent=1).encode())

    def process(self) -> psutil.Process | None:
        """The process; None if it has ended, even if another has its pid by now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            apart = abs(process.create_time() - self.create_time)
            if apart <= SAME_START_SECONDS and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


def telling(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that a run would notice, without PART, which every started process has."""
    return {k: v for k, v in env.items() if k.startswith(TELLING) and k != PART}


def start(
    name: str, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path, port: int = 0
) -> Service:
    """Start `argv` in a session of its own, where no Ctrl-C of this terminal reaches it."""
    with log.open("ab") as out:
        out.write(f"\n--- {time.strftime('%Y-%m-%d %H:%M:%S')} {name} starts\n".encode())
        out.flush()
        child = psutil.Popen(
            argv, env={**env, PART: name}, cwd=cwd, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip
    return Service(name=name, pid=child.pid, create_time=child.create_time(), log=log, port=port)


def family(**variables: str) -> list[psutil.Process]:
    """The processes that have these variables, by their environment; without this one."""
    wanted = variables.items()
    return [
        process
        for process in psutil.process_iter(["environ"])
        if wanted <= (process.info["environ"] or {}).items() and process.pid != os.getpid()
    ]


def part(layout: Layout, name: str) -> list[psutil.Process]:
    """A process of the stack and all that it started, or those of them that are left."""
    return family(**{"MTA_ROOT": str(layout.root), PART: name})


def jobs(layout: Layout) -> list[psutil.Process]:
    """The processes of flow runs: what the worker started."""
    worker = Service.load(layout, WORKER)
    return [one for one in part(layout, WORKER) if worker is None or one.pid != worker.pid]


def end(processes: Iterable[psutil.Process]) -> None:
    """End processes; return when they have gone."""
    alive = list(processes)
    for sign, patience in SIGNALS:
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.send_signal(sign)
        _, alive = psutil.wait_procs(alive, timeout=patience)


def free_port(preferred: int = 0) -> int:
    """`preferred` if it is free, else the next free one, else any."""
    for port in (*range(preferred, min(preferred + 100, 65536)), 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            # As servers do: a port whose last owner has just gone counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return int(probe.getsockname()[1])
    raise StackError("no port of this machine is free")


def last_line(log: Path) -> str:
    """The last line of `log` that says something, for an error message."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]
    said = [line.strip(" │╭╮╰╯─\t") for line in lines]
    return next((line for line in reversed(said) if line), "")


def wait_until(service: Service, ready: Callable[[], bool], timeout: float = START_SECONDS) -> None:
    """Wait for `ready()`, saying now and then what is waited for.

    Raises StackError when the process ends first, or after `timeout` seconds.
    """
    for look in range(int(timeout / LOOK_SECONDS)):
        if ready():
            return
        if service.process() is None:
            words = last_line(service.log)
            raise StackError(f"{service.name} ended while starting: {words} (see {service.log})")
        if look % 50 == 25:
            say(f"still waiting for {service.name}")
        time.sleep(LOOK_SECONDS)
    raise StackError(
        f"{service.name} does not answer after {timeout:.0f} s (see {service.log}): "
        "`make stop` ends it"
    )


def one_at_a_time(layout: Layout) -> contextlib.AbstractContextManager[object]:
    """Hold the stack's lock: two commands must not start or stop the same things at once."""
    layout.run.mkdir(parents=True, exist_ok=True)
    waiting = partial(say, "waiting for another command that starts or stops the stack")
    return locked(layout.run / "lock", waiting)

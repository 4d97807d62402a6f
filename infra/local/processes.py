"""Processes that outlive the command that started them: start, recognise, wait for, end.

Not run by itself. Each has a record, `.mta/run/<name>.json`; a pid in a record is believed only
while it is still the process that was started, because the system hands pids out again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from infra.local.settings import HOST, StackError
from tasks.store.processes import host

# A clock that is set while a process runs moves its reported start by as much; a second or two
# comes from rounding alone.
SAME_START_SECONDS = 2.0

# What of the environment changes how a run behaves, and so calls for a new worker.
TELLING = ("CUDA_", "HF_", "MLFLOW_", "MTA_", "OMP_", "PREFECT_", "TOKENIZERS_", "TORCH")


@dataclass(frozen=True)
class Record:
    """One started process, as kept in `.mta/run/<name>.json`."""

    name: str
    pid: int
    create_time: float
    argv: list[str]
    port: int  # 0: it has none
    environment: str
    host: str = ""  # since its boot, and which container of it; "": not written down

    @classmethod
    def load(cls, folder: Path, name: str) -> Record | None:
        try:
            return cls(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None  # never started, or cut off while it was written: as good as not there

    def save(self, folder: Path) -> None:
        path = folder / f"{self.name}.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        new.replace(path)

    def forget(self, folder: Path) -> None:
        (folder / f"{self.name}.json").unlink(missing_ok=True)

    def process(self) -> psutil.Process | None:
        """The process, or None where it has ended or the pid is another's by now."""
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            same_start = abs(process.create_time() - self.create_time) <= SAME_START_SECONDS
            return process if same_start or process.cmdline() == self.argv else None
        except psutil.Error:
            return None


def fingerprint(env: Mapping[str, str]) -> str:
    """A digest of what a run would notice in `env`: kept instead of the values, some are secret."""
    telling = sorted((k, v) for k, v in env.items() if k.startswith(TELLING))
    return hashlib.sha256(json.dumps(telling).encode()).hexdigest()[:16]


def start(
    name: str,
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    log: Path,
    port: int = 0,
) -> Record:
    """Start `argv` in a session of its own, so that it and its children can be found again."""
    with log.open("ab") as out:
        out.write(f"\n--- {time.strftime('%Y-%m-%d %H:%M:%S')} {name} starts\n".encode())
        out.flush()
        child = subprocess.Popen(
            list(argv),
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        created = psutil.Process(child.pid).create_time()
    except psutil.Error:
        created = time.time()
    return Record(name, child.pid, created, list(argv), port, fingerprint(env), host())


def session_leftovers(record: Record) -> list[psutil.Process]:
    """What is left of a started process's session after the process itself has gone.

    A pid is not handed out again while a session of that number has members, so if the pid now
    belongs to a stranger, nothing is left of the old session. Nor is anything after a reboot, when
    a session of that number is a stranger's.
    """
    if record.host not in ("", host()):
        return []
    if psutil.pid_exists(record.pid) and not _is_zombie(record.pid):
        return []
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if process.pid != record.pid and os.getsid(process.pid) == record.pid:
                left.append(process)
    return left


def _is_zombie(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def end(record: Record, *, grace: float = 3.0, patience: float = 15.0) -> None:
    """End the process and all its children; return when they have gone.

    SIGTERM twice, `grace` seconds apart: a Prefect worker takes the first one as "finish what you
    are doing" and only the second as "now". After `patience` more seconds, SIGKILL.
    """
    process = record.process()
    children: list[psutil.Process] = []
    if process is not None:
        with contextlib.suppress(psutil.Error):
            children = process.children(recursive=True)
        for wait in (grace, patience):
            with contextlib.suppress(psutil.Error):
                process.terminate()
            psutil.wait_procs([process], timeout=wait)
            if record.process() is None:
                break
        else:
            with contextlib.suppress(psutil.Error):
                process.kill()
            psutil.wait_procs([process], timeout=5)
    end_all({*children, *session_leftovers(record)}, grace=grace)


def end_all(processes: Iterable[psutil.Process], *, grace: float = 3.0) -> None:
    """SIGTERM to each, SIGKILL to those still there after `grace` seconds."""
    alive = [p for p in processes if p.is_running()]
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.send_signal(sign)
        _, alive = psutil.wait_procs(alive, timeout=grace)
        if not alive:
            return


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` of this machine now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a port whose last owner has just gone counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_port(preferred: int, taken: Iterable[int] = ()) -> int:
    """`preferred` if it is free, else the next free one, else any."""
    taken = set(taken)
    for port in range(preferred, min(preferred + 100, 65536)):
        if port not in taken and is_free(port):
            return port
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def last_line(log: Path) -> str:
    """The last line of `log` that says something, for an error message."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]
    except FileNotFoundError:
        return ""
    said = [line.strip(" │╭╮╰╯─\t") for line in lines]
    return next((line for line in reversed(said) if line), "")


def wait_until(
    what: str,
    ready: Callable[[], bool],
    *,
    record: Record,
    log: Path,
    timeout: float,
    say: Callable[[str], None],
) -> None:
    """Wait for `ready()`, saying now and then what is waited for; fail if the process has ended."""
    began = time.monotonic()
    next_word = 5.0
    while not ready():
        waited = time.monotonic() - began
        if record.process() is None:
            raise StackError(f"{what} ended while starting: {last_line(log)} (see {log})")
        if waited > timeout:
            raise StackError(f"{what} is not ready after {timeout:.0f} s (see {log})")
        if waited >= next_word:
            say(f"still waiting for {what} ({waited:.0f} s)")
            next_word += 5.0 if next_word < 20 else 20.0
        time.sleep(0.2)


@contextlib.contextmanager
def one_at_a_time(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the stack's lock: two commands must not start or stop the same things at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another command that starts or stops the stack")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield

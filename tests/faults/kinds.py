"""The faults: kill -9 of a process at a random or a chosen moment, a full disk, a damaged store."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.faults.pieces import Ledger
from tests.faults.ways import Way


@dataclass(frozen=True)
class Draw:
    """What the seed decides of one fault, each from 0 to 1: when, at what, and how."""

    fraction: float
    target: float
    detail: float


Strike = Callable[[Way, Draw, Ledger], str | None]


@dataclass(frozen=True)
class Kind:
    """A fault. strike: what it does, in a few words; None where there was nothing to strike.

    after: files below `.mta` of which new ones are waited for, at most `many`, instead of for a
    random moment. fresh: everything but the store is removed before. ways: on which it is tried.
    """

    strike: Strike
    after: str = ""
    many: int = 1
    fresh: bool = False
    ways: tuple[str, ...] = ("alone", "stack")

    def count(self, draw: Draw) -> int:
        """How many new files are waited for."""
        return 1 + int(draw.target * self.many)


def killed(process: psutil.Process | None) -> str | None:
    if process is None:
        return None
    with suppress(psutil.NoSuchProcess):
        process.kill()
        # Its parent may be slow to hear of it: a zombie is as dead.
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
    return f"pid {process.pid}"


def process_named(name: str) -> Strike:
    """A kill of the process of a run or its stack that is called so."""
    return lambda way, _draw, _ledger: killed(way.process(name))


def helper(way: Way, draw: Draw, _ledger: Ledger) -> str | None:
    """A process that the job started: its own server, or one that works for it."""
    with suppress(psutil.Error):
        job = way.process("job")
        helpers = job.children(recursive=True) if job else []
        if helpers:
            return killed(helpers[int(draw.target * len(helpers))])
    return None


def disk_full(way: Way, _draw: Draw, _ledger: Ledger) -> str | None:
    """The job and those that work for it may write no file any further."""
    said = None
    with suppress(psutil.Error, ProcessLookupError):
        job = way.process("job")
        workers = job.children() if job else []
        for one in [job, *(one for one in workers if "spawn_main" in " ".join(one.cmdline()))]:
            if one is not None:
                resource.prlimit(one.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
                said = f"pid {one.pid}"
    return said


def damage(change: Callable[[bytes, float], bytes | None], results: bool) -> Strike:
    """A change of one random file in the store, or its deletion where `change` gives None.

    results: whether it may be one of Prefect's results. They have no hash: no other number in one
    would be noticed.
    """

    def strike(way: Way, draw: Draw, ledger: Ledger) -> str | None:
        root = way.layout.store
        places = [*root.glob("*/??/*"), *(root.glob("results/*") if results else ())]
        files = sorted(
            file
            for place in places
            for file in ([place] if place.is_file() else place.rglob("*"))
            if file.is_file() and file.stat().st_size
        )
        if not files:
            return None
        file = files[int(draw.target * len(files))]
        ledger.damage(file)
        content = change(file.read_bytes(), draw.detail)
        if content is None:
            file.unlink()
        else:
            # Another file of that name: what a process has open or mapped stays as it was read.
            new = root / "damaged"
            new.write_bytes(content)
            new.replace(file)
        return str(Path(file.relative_to(root).parts[0], file.name))

    return strike


def _flipped(content: bytes, where: float) -> bytes:
    place = int(where * len(content))
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def _early(way: Way, draw: Draw, _ledger: Ledger) -> str | None:
    time.sleep(3 * draw.detail)
    return killed(way.process("job"))


job = process_named("job")
KINDS: dict[str, Kind] = {
    "job": Kind(job),
    "helper": Kind(helper),
    "making": Kind(job, after="store/.making/*", many=8),
    "checkpoint": Kind(job, after="checkpoints/*/*.safetensors", many=2),
    "stored": Kind(job, after="store/*/??/*", many=8),
    "result": Kind(job, after="store/results/*", many=5),
    "run_file": Kind(job, after="runs/*"),
    # While Prefect's or MLflow's database is made.
    "early": Kind(_early, after="local/.partial-*", many=2, fresh=True, ways=("alone",)),
    "worker": Kind(process_named("worker"), ways=("stack",)),
    "server": Kind(process_named("server"), ways=("stack",)),
    "mlflow": Kind(process_named("mlflow"), ways=("stack",)),
    "disk_full": Kind(disk_full),
    "bit_flip": Kind(damage(_flipped, results=False)),
    "truncation": Kind(damage(lambda content, at: content[: int(at * len(content))], True)),
    "deletion": Kind(damage(lambda content, at: None, results=True)),
}

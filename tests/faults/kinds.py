"""The faults, one small function each: kill -9 of a process, a full disk, a damaged store.

A function gets the run and what the seed drew for it, strikes once, and returns what it did in a
few words; or None where there was nothing to strike. KINDS is the table of them.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.faults.pieces import Ledger
from tests.faults.ways import Way
from tests.ray_nodes import JOB_NODES

BALLAST = "ballast"


@dataclass(frozen=True)
class Draw:
    """What the seed decides of one fault: when, at what, and how."""

    fraction: float  # of the time the run is thought to take from here
    target: float
    detail: float

    def of(self, many: list[Path]) -> Path:
        return many[int(self.target * len(many))]


Strike = Callable[[Way, Draw, Ledger], str | None]


def killed(process: psutil.Process | None) -> str | None:
    if process is None:
        return None
    try:
        process.kill()
        # Its parent may be slow to hear of it: a zombie is as dead.
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
    except psutil.NoSuchProcess:
        pass
    return f"pid {process.pid}"


def worker(way: Way, _draw: Draw, _ledger: Ledger) -> str | None:
    return killed(way.process("worker"))


def job(way: Way, _draw: Draw, _ledger: Ledger) -> str | None:
    return killed(way.process("job"))


def helper(way: Way, draw: Draw, _ledger: Ledger) -> str | None:
    """A process that the job started: its own server, or one that works for it."""
    parent = way.process("job")
    try:
        helpers = parent.children(recursive=True) if parent else []
    except psutil.Error:
        return None
    return killed(helpers[int(draw.target * len(helpers))]) if helpers else None


def server(way: Way, draw: Draw, _ledger: Ledger) -> str | None:
    """The Prefect server; its user notices after a moment."""
    said = killed(way.process("server"))
    if said:
        time.sleep(5 * draw.detail)
    return said


def mlflow(way: Way, _draw: Draw, _ledger: Ledger) -> str | None:
    """The MLflow server's first process: those that serve for it are left, and hold its port."""
    return killed(way.process("mlflow"))


def ray_node(way: Way, draw: Draw, _ledger: Ledger) -> str | None:
    """All processes of a node that runs jobs."""
    pid = way.node(int(draw.target * JOB_NODES))
    return pid and f"raylet {pid}"


def disk_full(way: Way, _draw: Draw, _ledger: Ledger) -> str | None:
    """Nothing more can be written: the store's tmpfs is filled to the last byte, or, where none
    could be mounted, the job may write no file any further (RLIMIT_FSIZE)."""
    store = way.layout.store
    if os.path.ismount(store):
        with contextlib.suppress(OSError), (store / BALLAST).open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        return "tmpfs"
    process = way.process("job")
    if process is None:
        return None
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    return "RLIMIT_FSIZE"


def disk_freed(way: Way) -> None:
    (way.layout.store / BALLAST).unlink(missing_ok=True)


def bit_flip(way: Way, draw: Draw, ledger: Ledger) -> str | None:
    def flipped(content: bytes) -> bytes:
        place = int(draw.detail * len(content))
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    return _changed(way, draw, ledger, flipped)


def truncation(way: Way, draw: Draw, ledger: Ledger) -> str | None:
    return _changed(way, draw, ledger, lambda content: content[: int(draw.detail * len(content))])


def deletion(way: Way, draw: Draw, ledger: Ledger) -> str | None:
    return _changed(way, draw, ledger, None)


def _changed(
    way: Way, draw: Draw, ledger: Ledger, change: Callable[[bytes], bytes] | None
) -> str | None:
    """Damage one file of one finished piece, or delete it (`change` is None)."""
    root = way.layout.store
    files = sorted(
        path
        for place in root.glob("*/*/*")
        if not place.name.startswith(".")
        for path in place.rglob("*")
        if path.is_file() and path.stat().st_size
    )
    if not files:
        return None
    file = draw.of(files)
    stage, _, key, *inside = file.relative_to(root).parts
    ledger.damage(f"{stage}/{key}")
    if change is None:
        file.unlink()
    else:
        # Another file of that name: what a process has open or mapped stays as it was read.
        new = root / "damaged"
        new.write_bytes(change(file.read_bytes()))
        new.replace(file)
    return f"{'/'.join(inside)} of {stage}"


# kind -> what it does.
ON_STACK: dict[str, Strike] = {
    "worker": worker,
    "job": job,
    "helper": helper,
    "server": server,
    "mlflow": mlflow,
    "disk_full": disk_full,
    "bit_flip": bit_flip,
    "truncation": truncation,
    "deletion": deletion,
}
ALONE: dict[str, Strike] = {
    "job": job,
    "helper": helper,
    "disk_full": disk_full,
    "bit_flip": bit_flip,
    "truncation": truncation,
    "deletion": deletion,
}
ON_RAY: dict[str, Strike] = {
    "ray_node": ray_node,
    "job": job,
    "truncation": truncation,
}

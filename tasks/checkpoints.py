"""The checkpoints of stages that train: where they lie, whose they are, and when they go.

    <store>/../checkpoints/<stage>/<key>.safetensors

One per job that trains; removed when its result is there. A job that was killed finds it when it is
run again. What it holds was trained on users, so it names them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.config.options import ComputeOptions
from tasks.log import log
from tasks.record import digest
from tasks.results.store import Store, store

if TYPE_CHECKING:
    from tasks.lora.checkpoint import Checkpoint

FOLDER = "checkpoints"
# One that nobody went on from for so long is of work that nobody wants.
SECONDS = 30 * 24 * 3600.0


@contextmanager
def checkpoint(
    compute: ComputeOptions, stage: str, key: str, users: Sequence[str]
) -> Iterator[Checkpoint | None]:
    """Where the training of `key` keeps its state; None where it is to keep none.

    key: of all that the training depends on. users: all whom it trains on. The file is removed when
    the block ends well: keep what was trained inside it.
    """
    from tasks.lora.checkpoint import VERSION, Checkpoint

    if not compute.checkpoint_seconds:
        yield None
        return
    path = folder(store()) / stage / f"{key}.safetensors"
    work = digest([VERSION, stage, key])
    about = {"stage": stage, "users": list(users)}
    yield Checkpoint(path, work, about, compute.checkpoint_seconds, log)
    path.unlink(missing_ok=True)


def folder(where: Store) -> Path:
    """Beside the store: what lies there is no result."""
    return where.state / FOLDER


def sweep(where: Store) -> None:
    """Remove checkpoints that are older than a month."""
    for path in folder(where).glob("*/*.safetensors"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > SECONDS:
                path.unlink()

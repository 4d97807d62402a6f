"""The checkpoints of stages that train: where they lie, whose they are, and when they go.

    <store>/../checkpoints/<stage>/<key>.safetensors

One per job that trains, under the key of its piece; removed when the piece is there. A job that
was killed finds it when it is run again. What it holds was trained on users, so it names them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.config import RunConfig
from tasks.stage import log
from tasks.store.artifacts import Store
from tasks.store.files import PARTIAL
from tasks.store.pieces import digest
from tasks.store.processes import abandoned

if TYPE_CHECKING:
    from tasks.lora.checkpoint import Checkpoint

FOLDER = "checkpoints"
# One that nobody went on from for so long is of work that nobody wants.
DAYS = 30


def checkpoint_of(
    options: RunConfig,
    where: Store,
    stage: str,
    key: str,
    users: Sequence[str],
    *,
    rows: Sequence[str] = (),
    pieces: Sequence[str] | None = None,
) -> Checkpoint | None:
    """Where the job `key` of a stage keeps its training; None where it is to keep none.

    users: all whom it trains on. rows: the keys of those whom it trains at once, in order, where
    `key` does not say. pieces: the keys of what comes of it, if not `key`.
    """
    from tasks.lora.checkpoint import VERSION, Checkpoint

    seconds = options.compute.checkpoint_seconds
    if not seconds:
        return None
    about = {"stage": stage, "pieces": list(pieces or [key]), "users": list(users)}
    own = digest({"version": VERSION, "stage": stage, "key": key, "rows": list(rows)})
    return Checkpoint(place(where, stage, key), own, about, seconds, log)


def place(where: Store, stage: str, key: str) -> Path:
    return folder(where) / stage / f"{key}.safetensors"


def folder(where: Store) -> Path:
    """Beside the store: what lies there is no result."""
    return where.root.parent / FOLDER


def remove(where: Store, stage: str, key: str) -> None:
    """The job's pieces are there: nobody will go on from its checkpoint."""
    place(where, stage, key).unlink(missing_ok=True)


def sweep(where: Store) -> None:
    """Remove checkpoints whose pieces are all there, those older than DAYS, and halves of them."""
    for path in folder(where).glob("*/*.safetensors"):
        from tasks.lora.checkpoint import about_of  # and torch: only where there is one

        about = None if _old(path) else about_of(path)
        # One that cannot be read is left to the job that wants it, which says so.
        if _old(path) or (about and all(where.find(path.parent.name, k) for k in about["pieces"])):
            path.unlink(missing_ok=True)
    for path in folder(where).glob(f"*/{PARTIAL}*"):
        if abandoned(path.name, PARTIAL):
            path.unlink(missing_ok=True)


def _old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > DAYS * 24 * 3600
    except FileNotFoundError:
        return False

"""The checkpoints of stages that train: <store>/../checkpoints/<stage>/<key>.safetensors.

One per job that trains; removed when its result is there. A job that was killed finds it when it is
run again. What it holds was trained on users, so it names them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tasks.config.options import ComputeOptions
from tasks.log import log
from tasks.record import digest
from tasks.results.store import store

if TYPE_CHECKING:
    from tasks.lora.checkpoint import Checkpoint


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
    path = store().checkpoints / stage / f"{key}.safetensors"
    about = {"stage": stage, "users": list(users)}
    work = digest([VERSION, stage, key])
    yield Checkpoint(path, work, about, compute.checkpoint_seconds, log)
    path.unlink(missing_ok=True)

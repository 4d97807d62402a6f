"""What a stage is tried again for, by Prefect itself, and a run whose disk is full."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import flow

from flows.mta import mta
from tasks.errors import InputError
from tasks.running.faults import DISK_FULL
from tasks.stage import stage, store
from tasks.store import artifacts
from tasks.store.artifacts import Store
from tasks.store.pieces import Piece, digest
from tests.flows.conftest import records
from tests.small import SMALL


def tries(workplace: Path, errors: list[Exception]) -> tuple[Any, int]:
    """The final state of a stage that raises `errors`, one per try, before it succeeds."""
    calls: list[int] = []
    where: Store = store()

    @stage(name="demo")
    def demo() -> Piece:
        calls.append(1)
        if len(calls) <= len(errors):
            raise errors[len(calls) - 1]
        return where.get("demo", digest(str(errors)), lambda _out: {})

    @flow
    def once() -> None:
        ended.append(demo.with_options(retry_delay_seconds=[0.01])(return_state=True))

    ended: list[Any] = []
    once()
    return ended[0], len(calls)


@pytest.mark.parametrize(
    ("errors", "calls", "name"),
    [
        ([httpx.ConnectError("refused"), ConnectionResetError(104, "reset")], 3, "Completed"),
        ([httpx.ReadTimeout("slow")] * 9, 5, "Failed"),
        ([InputError("file x: record 3 has no tag")], 1, "Failed"),
        ([ValueError("a bug")], 1, "Failed"),
        ([OSError(errno.ENOSPC, "No space left on device")], 1, DISK_FULL),
        ([ConnectionError("reset"), InputError("file x: no tag")], 2, "Failed"),
    ],
)
def test_tries(workplace: Path, errors: list[Exception], calls: int, name: str) -> None:
    """Four more after the first, and none for what lasts."""
    state, made = tries(workplace, errors)
    assert (made, state.name) == (calls, name)


def test_a_full_disk_stops_the_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second anchor on nothing can be written: no third is trained, nothing is scored."""
    real = artifacts.fsync

    def full(path: Path) -> None:
        whole = [key for key in records(workplace, "meta_lora") if not key.startswith(".")]
        if "/meta_lora/" in str(path) and "/.making-" in str(path) and whole:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path)

    monkeypatch.setattr(artifacts, "fsync", full)
    state = mta(**SMALL, return_state=True)
    assert (state.type.value, state.name) == ("FAILED", DISK_FULL)
    message = state.message or ""
    assert message.startswith("disk full: [Errno 28] No space left on device: ")
    assert message.endswith("make room and run it again, what is finished is kept")
    assert "\n" not in message
    assert len(records(workplace, "meta_lora")) == 1
    assert records(workplace, "predictions") == {}
    assert not list((workplace / ".mta").rglob(".making-*"))
    monkeypatch.undo()

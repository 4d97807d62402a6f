"""What a stage is tried again for, by Prefect itself, and a run whose disk is full."""

from __future__ import annotations

import errno
from pathlib import Path

import httpx
import pytest
from prefect import flow

from flows.mta import mta
from tasks.errors import DiskFull, InputError
from tasks.record import Result
from tasks.results import stage as stage_module
from tasks.results import store as store_module
from tasks.results.stage import StageFailed, stage
from tests.flows.conftest import folders
from tests.small import SMALL


class Demo(Result):
    """What the stage of these tests gives."""


def tries(errors: list[Exception], monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    """How a stage ends that raises `errors`, one per try, before it succeeds; and its calls."""
    calls: list[int] = []
    monkeypatch.setattr(stage_module, "DELAYS", [0.01] * 4)

    @stage(version=1)
    def demo(about: str) -> Demo:
        calls.append(1)
        if len(calls) <= len(errors):
            raise errors[len(calls) - 1]
        return Demo()

    @flow
    def once() -> None:
        try:
            demo(str(errors))
        except (StageFailed, DiskFull) as error:
            ended.append(type(error).__name__)
        else:
            ended.append("completed")

    ended: list[str] = []
    once()
    return ended[0], len(calls)


@pytest.mark.parametrize(
    ("errors", "calls", "name"),
    [
        ([httpx.ConnectError("refused"), ConnectionResetError(104, "reset")], 3, "completed"),
        ([httpx.ReadTimeout("slow")] * 9, 5, "StageFailed"),
        ([InputError("file x: record 3 has no tag")], 1, "StageFailed"),
        ([ValueError("a bug")], 1, "StageFailed"),
        ([OSError(errno.ENOSPC, "No space left on device")], 1, "DiskFull"),
        ([ConnectionError("reset"), InputError("file x: no tag")], 2, "StageFailed"),
    ],
)
def test_tries(
    workplace: Path, errors: list[Exception], calls: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four more after the first, and none for what lasts."""
    assert tries(errors, monkeypatch) == (name, calls)


def test_a_full_disk_stops_the_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second anchor on nothing can be written: no third is trained, nothing is scored."""
    real = store_module.fsync

    def full(path: Path) -> None:
        if (path / "meta_lora.json").exists() and folders(workplace, "meta_lora"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path)

    monkeypatch.setattr(store_module, "fsync", full)
    state = mta(**SMALL, return_state=True)
    assert (state.type.value, state.name) == ("FAILED", "DiskFull")
    message = state.message or ""
    assert message.startswith("disk full: [Errno 28] No space left on device: ")
    assert message.endswith("make room and run it again, what is finished is kept")
    assert "\n" not in message
    assert len(folders(workplace, "meta_lora")) == 1
    assert folders(workplace, "answers") == []
    assert not list((workplace / ".mta" / "store" / ".making").iterdir())
    monkeypatch.undo()

"""A run whose disk is full."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from flows.mta import mta
from tasks.results import store as store_module
from tests.flows.conftest import folders
from tests.small import SMALL


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

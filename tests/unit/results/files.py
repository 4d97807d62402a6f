"""What the tests of the store write, and how they damage it."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from tasks.record import File
from tasks.results.store import Store

_TIMES = itertools.count(1)


def make(store: Store, stage: str = "bank", text: str = "weights") -> File:
    """A stored folder of three files, one of them empty."""
    with store.new(stage) as folder:
        (folder.path / "deep").mkdir()
        (folder.path / "deep" / "file.bin").write_text(text)
        (folder.path / "table.txt").write_text("rows")
        (folder.path / "empty").touch()
    return folder.file()


def flip(file: Path) -> None:
    """Change a file's first byte, some time after it was written."""
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    os.utime(file, (next(_TIMES),) * 2)

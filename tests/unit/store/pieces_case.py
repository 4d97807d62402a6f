"""What the tests of the store make: one piece of two files, and its key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.store.pieces import digest

KEY = digest("some work")


def write(text: str = "weights", **value: Any) -> Callable[[Path], dict[str, Any]]:
    def make(out: Path) -> dict[str, Any]:
        (out / "deep").mkdir()
        (out / "deep" / "file.bin").write_text(text)
        (out / "table.txt").write_text("rows")
        return {"answer": 42, **value}

    return make


def never(_out: Path) -> dict[str, Any]:
    raise AssertionError("made although it is there")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)

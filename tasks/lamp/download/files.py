"""What downloading does to files: cheap checks of JSON, writing that survives a crash."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from tasks.errors import InputError
from tasks.lamp.checks import short
from tasks.store.files import fsync

# What of a file's two ends is looked at.
END_BYTES = 512
OTHER_WAYS = "data=<folder> takes files that you have, lamp.url=<mirror> another address"


def check_start(start: bytes, brackets: str, name: str) -> None:
    """InputError unless JSON that opens with brackets[0] can start like this.

    name: what to call the file, its address or its path.
    """
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(brackets[0].encode()):
        return
    if text.startswith(b"<"):
        # The benchmark's site answers so, with status 200, to some addresses that do not exist.
        problem = "holds a web page instead of JSON, so its address was wrong"
    elif start.startswith((b"\x1f\x8b", b"PK", b"\x28\xb5\x2f\xfd")):
        problem = "is compressed; plain JSON is needed"
    elif not text:
        problem = "is empty"
    else:
        problem = f"starts with {short(text[:20].decode(errors='replace'))}, not {brackets[0]}"
    raise InputError(f"{name}: {problem}; {OTHER_WAYS}")


def ends(file: Path, brackets: str) -> bool:
    """Whether the file's last character closes its JSON."""
    with file.open("rb") as opened:
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - END_BYTES))
        return opened.read().rstrip().endswith(brackets[1].encode())


def check_json(file: Path, brackets: str, name: str) -> None:
    """InputError unless both ends of the file are those of its JSON."""
    with file.open("rb") as opened:
        check_start(opened.read(END_BYTES), brackets, name)
    if not ends(file, brackets):
        raise InputError(f"{name}: does not end with {brackets[1]}, so it is cut off; {OTHER_WAYS}")


def write_json(file: Path, value: Any) -> None:
    """Whole or not at all, and on the disk when this returns."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fsync(new)
    new.replace(file)
    fsync(file.parent)


def disk_problem(path: Path, error: OSError) -> InputError:
    """What a failed write says to a person."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(
            f"{path}: no space left on the disk; free some, or set lamp.cache to a folder on "
            "another one (what has come is kept, the next run goes on from there)"
        )
    return InputError(
        f"{path}: {error.strerror or error}; set lamp.cache to a folder that can be written to"
    )

"""Users as JSON Lines, one JSON object a line, with one line in memory at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from tasks.errors import InputError
from tasks.lamp.checks import decoder, reading
from tasks.lamp.records import LONGEST, Text

_JSON = decoder()


def is_lines(file: Path) -> bool:
    """Whether the file begins with an object; a list of users begins with a bracket."""
    with reading(file), file.open("rb", buffering=0) as handle:
        return Text(file, handle).next() == "{"


def read_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, record) of every line that is not blank.

    Raises InputError for a line that is not JSON, not UTF-8, or longer than LONGEST bytes.
    """
    offset = 0
    with reading(file), file.open("rb") as handle:
        if handle.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            offset = len(codecs.BOM_UTF8)
        handle.seek(offset)
        for number in count(1):
            line = handle.readline(LONGEST + 1)
            if not line:
                return
            if len(line) > LONGEST:
                raise InputError(
                    f"{file}: line {number}: does not end within {LONGEST >> 20} MiB; one user "
                    "stands on one line"
                )
            if line.strip(b" \t\n\r"):
                yield number, _record(file, number, line, offset)
            offset += len(line)


def _record(file: Path, number: int, line: bytes, offset: int) -> Any:
    """Decode one line. offset: its first byte in the file."""
    where = f"{file}: line {number}"
    try:
        text = line.decode("utf-8").rstrip("\r\n")
        return _JSON.decode(text)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 at byte {offset + error.start}; repair it, or get the file again"
        ) from None
    except json.JSONDecodeError as error:
        byte = offset + len(text[: error.pos].encode())
        raise InputError(
            f"{file}: not valid JSON at line {number}, column {error.pos + 1} (byte {byte}: "
            f"{error.msg}); a file that begins with an object must hold one user a line, as JSON "
            "Lines; else give a JSON list of users"
        ) from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where}: cannot be read ({error}); repair it") from None

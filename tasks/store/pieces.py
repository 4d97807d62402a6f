"""A piece of the store: its record, its hashes, and whether it still is as it was made."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

from tasks.store.files import file_sha256

RECORD = "record.json"
# The part of what a stage returns that goes to `Piece.notes` instead of its value.
NOTES = "notes"


class Ref(TypedDict):
    """`uri` relative to the store, `sha256` over the piece's files and value, `kind` = stage."""

    uri: str
    sha256: str
    kind: str


@dataclass(frozen=True)
class Piece:
    """A verified result: its reference, its JSON value, its folder, and whether it was found.

    `notes` is what differs from one making to the next (times); no key or number depends on it.
    """

    ref: Ref
    value: dict[str, Any]
    notes: dict[str, Any]
    folder: Path
    cached: bool


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


# The hash of a large file that this process has read, by all that changes when the file does.
_HASHES: dict[tuple[str, int, int, int, int], str] = {}
LARGE = 64 << 20


def known_sha256(path: Path) -> str:
    """As `file_sha256`, but a file of LARGE bytes is read once as long as its size and times stay.

    Users of gigabytes are opened by every job that needs one of them.
    """
    stat = path.stat()
    if stat.st_size < LARGE:
        return file_sha256(path)
    key = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key not in _HASHES:
        _HASHES[key] = file_sha256(path)
    return _HASHES[key]


Stamp = tuple[int, int, int]


def stamp_of(record: Path) -> Stamp:
    """What tells one making of a piece from the next: inode, size and time of its record.

    Raises OSError where there is none.
    """
    stat = record.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


# The rows of a piece whose record this process has read, with the record's stamp.
_ROWS: dict[str, tuple[Stamp, list[str]]] = {}


def row_keys(record: Path) -> list[str]:
    """The keys of the rows that a record lists; none where it cannot be understood.

    Each job asks all records of its stage: one is read again only when it is another.
    """
    stamp = stamp_of(record)
    if _ROWS.get(str(record), (None,))[0] != stamp:
        try:
            rows = json.loads(record.read_text())["value"].get("rows", [])
        except (ValueError, KeyError, TypeError, AttributeError):
            rows = []
        _ROWS[str(record)] = (stamp, rows)
    return _ROWS[str(record)][1]


def folder_files(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file in `folder` except the record, in name order."""
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / RECORD
    }


@cache
def library_versions(names: tuple[str, ...]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names}


def content(record: dict[str, Any]) -> str:
    """The hash of a piece: over its files and value, not its notes."""
    return digest([record["files"], record["value_sha256"]])


def verified(folder: Path) -> tuple[dict[str, Any], Stamp] | str:
    """The record of a piece that is as it was made, and its stamp; else what is wrong with it, in a
    few words."""
    try:
        stamp = stamp_of(folder / RECORD)
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        files, value, notes = record["files"], record["value"], record["notes"]
        # Notes decide no number, so they are in no reference; but they are read.
        hashes = (record["value_sha256"], record.get("notes_sha256", digest(notes)))
        if (digest(value), digest(notes)) != hashes:
            return f"{RECORD} does not match its hash"
    except FileNotFoundError:
        return f"{RECORD} is missing"
    # Not OSError: what cannot be read just now (too many open files, say) is not damaged.
    except (ValueError, KeyError, TypeError):
        return f"{RECORD} cannot be understood"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if known_sha256(path) != expected:
            return f"{name} does not match its hash"
    return record, stamp

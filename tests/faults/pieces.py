"""What is in a store and whole, what was made again, and whether two runs gave the same.

Read by the store's format, not by the store: that mends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors.numpy import load_file

from tasks.files import sha256_of
from tasks.record import File
from tasks.results.store import RESULTS, ROWS

TOLERANCE = 1e-5
# Fields that decide no number: when and how long, and what the run is called.
PASSING = {"seconds", "made_of", "cached", "id", "name", "date", "report", "summary"}


@dataclass(frozen=True)
class Piece:
    """A result or a user's row that is whole. mark: changes when it is made again."""

    mark: str
    folders: frozenset[str]


def whole(root: Path) -> dict[str, Piece]:
    """The results and rows of a store whose files are all as they were made."""
    found = {}
    for path in (root / RESULTS).glob("*"):
        with suppress(OSError, ValueError, KeyError):
            files = list(files_in(json.loads(json.loads(path.read_bytes())["result"])["data"]))
            if all(sha256_of(root / file.uri) == file.sha256 for file in files):
                folders = frozenset(file.folder for file in files)
                mark = f"{RESULTS} {path.stat().st_mtime_ns}"
                found[f"{RESULTS}/{path.name}"] = Piece(mark, folders)
    for names in sorted(root.glob(f"*/??/*/{ROWS}")):
        folder = names.parent
        uri = folder.relative_to(root).as_posix()
        with suppress(OSError):
            if sha256_of(folder) == folder.name:
                for key in json.loads(names.read_bytes()):
                    found.setdefault(f"rows/{key}", Piece(uri, frozenset([uri])))
    return found


def files_in(value: Any) -> Iterator[File]:
    """Every file that a JSON value points to."""
    if isinstance(value, dict):
        if value.keys() == {"uri", "sha256"}:
            yield File(**value)
        else:
            for one in value.values():
                yield from files_in(one)
    elif isinstance(value, list):
        for one in value:
            yield from files_in(one)


@dataclass
class Ledger:
    """One run from an empty store to its end, through all its faults.

    seen: every piece that was ever whole. excused: those that the driver damaged. twice: those that
    were made again without such a reason.
    """

    root: Path
    seen: dict[str, Piece] = field(default_factory=dict)
    excused: set[str] = field(default_factory=set)
    twice: set[str] = field(default_factory=set)

    def look(self) -> None:
        """Note what is whole now, and what of it was made again."""
        now = whole(self.root)
        # Rows that were known are stored again beside a new one of their batch.
        repacked = {
            piece.mark
            for name, piece in now.items()
            if name not in self.seen or name in self.excused
        }
        for name, piece in now.items():
            if name in self.seen and self.seen[name].mark != piece.mark:
                if piece.mark not in repacked:
                    self.twice.add(name)
                self.excused.discard(name)
        self.seen |= now

    def damage(self, file: Path) -> None:
        """Before a file is damaged: what it belongs to may be made again."""
        name = file.relative_to(self.root).as_posix()
        folder = "/".join(name.split("/")[:3])
        self.excused |= {
            own for own, piece in self.seen.items() if own == name or folder in piece.folders
        }

    def lost(self) -> set[str]:
        """Whole once, and now gone or damaged."""
        return self.seen.keys() - whole(self.root).keys() - self.excused


@dataclass(frozen=True)
class Given:
    """What a run gave: its file as JSON, and the store that this points into."""

    run: Any
    root: Path

    @classmethod
    def last(cls, state: Path) -> Given | None:
        """Of the last run in a folder of state."""
        files = sorted((state / "runs").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return cls(json.loads(files[-1].read_bytes()), state / "store") if files else None

    def intact(self) -> bool:
        """Whether all files are as they were made."""
        with suppress(FileNotFoundError):
            return all(sha256_of(self.root / one.uri) == one.sha256 for one in files_in(self.run))
        return False

    def differing(self, other: Given) -> list[str]:
        """The fields and files in which another run is not the same to TOLERANCE."""
        return list(_differing(self.run, other.run, "run", (self.root, other.root)))


def _differing(one: Any, two: Any, name: str, roots: tuple[Path, Path]) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        if one.keys() == {"uri", "sha256"}:
            yield from _files(roots[0] / one["uri"], roots[1] / two["uri"], name)
        else:
            for key in one.keys() - PASSING:
                yield from _differing(one[key], two[key], f"{name}.{key}", roots)
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for number, (left, right) in enumerate(zip(one, two, strict=True)):
            yield from _differing(left, right, f"{name}.{number}", roots)
    elif isinstance(one, float) and isinstance(two, float):
        if not _close(one, two):
            yield f"{name}: {one} and {two}"
    elif one != two:
        yield f"{name}: {str(one)[:80]} and {str(two)[:80]}"


def _files(one: Path, two: Path, name: str) -> Iterator[str]:
    if one.is_dir():
        inside = [sorted(p.relative_to(root) for p in root.rglob("*")) for root in (one, two)]
        if inside[0] != inside[1]:
            yield f"{name}: other files"
        for path in inside[0]:
            if (one / path).is_file():
                yield from _files(one / path, two / path, f"{name}/{path}")
    elif one.suffix == ".safetensors":
        left, right = load_file(one), load_file(two)
        if left.keys() != right.keys() or not all(_close(left[k], right[k]) for k in left):
            yield f"{name}: other tensors"
    elif one.suffix == ".parquet":
        tables = [pl.read_parquet(path).to_dicts() for path in (one, two)]
        yield from _differing(tables[0], tables[1], name, (one, two))
    elif one.suffix != ".png" and one.read_bytes() != two.read_bytes():
        yield f"{name}: other bytes"


def _close(one: Any, two: Any) -> bool:
    if np.shape(one) != np.shape(two):
        return False
    return np.allclose(one, two, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)

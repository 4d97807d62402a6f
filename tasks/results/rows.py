"""Users one by one: what a batch made for each user is found again, in whatever batch it was.

A stage gives each user of a batch a row key (`key_of` what this user's part depends on), makes the
rows that are not known, and writes all of the batch into one folder, which names its rows
(`rows.json`: their keys, in order).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Generic, TypeVar

from tasks.record import File
from tasks.results.store import ROWS, Folder, Store, store

Row = TypeVar("Row")


class Rows(Generic[Row]):
    """The rows of a batch: those known from earlier batches, and those that are to be made.

    missing: the places of `keys` whose row is to be made, once per key; `add` takes them in that
    order. `folder` stores all rows of the batch, or the first that are missing.
    """

    def __init__(
        self, stage: str, keys: Sequence[str], read: Callable[[File], Sequence[Row]]
    ) -> None:
        """read: gives all rows of a folder."""
        self.stage, self.keys = stage, list(keys)
        self._known = known_rows(stage, keys, read)
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        self.missing = sorted(n for key, n in first.items() if key not in self._known)

    def add(self, made: Iterable[Row], first: int | None = None) -> None:
        """The rows of `missing`, in order, or of its `first` so many."""
        some = self.missing[:first]
        for number, row in zip(some, made, strict=True):
            self._known[self.keys[number]] = row
        self.missing = self.missing[len(some) :]

    def all(self) -> list[Row]:
        """Every row, in the order of the keys."""
        return [self._known[key] for key in self.keys]

    def folder(self, first: int | None = None) -> AbstractContextManager[Folder]:
        """A folder to write all rows into, or so many of `missing`; then they are found there."""
        keys = self.keys
        if first is not None:
            keys = [self.keys[number] for number in self.missing[:first]]
        return store().new(self.stage, keys)

    def counted(self) -> str:
        """How many are to be made, and how many are known, for a log."""
        known = len(self.keys) - len(self.missing)
        return f"{len(self.missing)} users, {known} known from before"


def known_rows(
    stage: str, keys: Iterable[str], read: Callable[[File], Sequence[Row]]
) -> dict[str, Row]:
    """The rows that are in the store, by key. A folder that is damaged is as if not there.

    As few folders are read as a greedy choice finds: first those with the most of the rows.
    """
    where, wanted = store(), set(keys)
    found: dict[str, Row] = {}
    numbered = [(folder, _numbers(folder)) for folder in _folders(where, stage) if wanted]
    for folder, numbers in sorted(numbered, key=lambda one: -len(wanted & one[1].keys())):
        own = (wanted - found.keys()) & numbers.keys()
        file = File(uri=folder.relative_to(where.root).as_posix(), sha256=folder.name)
        if own and where.intact(file):
            rows = read(file)
            found |= {key: rows[numbers[key]] for key in own}
    return found


def _folders(where: Store, stage: str) -> list[Path]:
    """The folders of a stage; those with rows that only lie at the URL are fetched."""
    if where.remote:
        for path in where.remote.list(stage):
            uri, _, name = path.rpartition("/")
            if name == ROWS and uri.count("/") == 2 and not (where.root / uri).exists():
                where.intact(File(uri=uri, sha256=Path(uri).name))
    return where.folders(stage)


def _numbers(folder: Path) -> dict[str, int]:
    """The number of each row in a folder, by key; none where it names no rows."""
    try:
        return _read_names(folder)
    except (OSError, ValueError):
        return {}


@cache
def _read_names(folder: Path) -> dict[str, int]:
    """Kept: a folder's content never changes under its name."""
    names = json.loads((folder / ROWS).read_text())
    return {key: number for number, key in enumerate(names)}

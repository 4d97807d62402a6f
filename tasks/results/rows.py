"""Users one by one: what a batch made for each user is found again, in whatever batch it was.

A stage gives each user of a batch a row key (`key_of` what this user's part depends on), makes the
rows that are not known, and writes all of the batch into one folder. The index, a SQLite table,
says in which folder, and at which number, a row lies. The folders name their rows (`rows.json`),
so that it can be made again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import PurePosixPath
from typing import Generic, TypeVar

from tasks.record import File
from tasks.results.store import Folder, Store, store

Row = TypeVar("Row")
INDEX = "rows.sqlite"
NAMES = "rows.json"
TABLE = """create table if not exists rows
    (key text primary key, uri text not null, sha256 text not null, number integer not null)"""
# All names in one parameter: of single ones SQLite takes only so many.
WANTED = """select key, uri, sha256, number from rows
    where key in (select value from json_each(?)) order by key"""


class Rows(Generic[Row]):
    """The rows of a batch: those known from earlier batches, and those that are to be made.

    missing: the places of `keys` whose row is to be made, once per key; `add` takes them in that
    order. `folder` stores all rows of the batch.
    """

    def __init__(
        self, stage: str, keys: Sequence[str], read: Callable[[File], Sequence[Row]]
    ) -> None:
        """read: gives all rows of a folder."""
        self.stage, self.keys = stage, list(keys)
        self._known = known_rows(stage, keys, read)
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        self.missing = sorted(n for key, n in first.items() if key not in self._known)

    def add(self, made: Iterable[Row]) -> None:
        """The rows of `missing`, in order."""
        for number, row in zip(self.missing, made, strict=True):
            self._known[self.keys[number]] = row
        self.missing = []

    def all(self) -> list[Row]:
        """Every row, in the order of the keys."""
        return [self._known[key] for key in self.keys]

    @contextmanager
    def folder(self) -> Iterator[Folder]:
        """A folder to write all rows into; afterwards they are found there."""
        with store().new(self.stage) as folder:
            yield folder
            name_rows(folder, self.keys)
        remember_rows(folder, self.keys)

    def counted(self) -> str:
        """How many are to be made, and how many are known, for a log."""
        known = len(self.keys) - len(self.missing)
        return f"{len(self.missing)} users, {known} known from before"


def known_rows(
    stage: str, keys: Sequence[str], read: Callable[[File], Sequence[Row]]
) -> dict[str, Row]:
    """The rows that are in the store, by key. A folder that is damaged is as if not there."""
    where = store()
    found: dict[str, Row] = {}
    folders: dict[File, list[tuple[str, int]]] = {}
    for key, file, number in _find(where, stage, keys):
        folders.setdefault(file, []).append((key, number))
    for file, places in folders.items():
        if where.intact(file):
            rows = read(file)
            found |= {key: rows[number] for key, number in places}
    return found


def name_rows(folder: Folder, keys: Sequence[str]) -> None:
    """Write down, in a folder that is being filled, which rows it will hold."""
    (folder.path / NAMES).write_text(json.dumps(list(keys)))


def remember_rows(folder: Folder, keys: Sequence[str]) -> None:
    """Put the rows of a stored folder into the index."""
    with closing(_index(store())) as index:
        _insert(index, folder.file(), keys)


def _find(where: Store, stage: str, keys: Sequence[str]) -> list[tuple[str, File, int]]:
    """Key, folder and number of the rows that are known."""
    with closing(_index(where)) as index:
        if where.remote:
            _take_in(where, index, stage)
        found = index.execute(WANTED, [json.dumps(sorted(set(keys)))])
        return [(key, File(uri=uri, sha256=sha256), n) for key, uri, sha256, n in found]


def _index(where: Store) -> sqlite3.Connection:
    where.root.mkdir(parents=True, exist_ok=True)
    index = sqlite3.connect(where.root / INDEX, timeout=60.0)
    known = index.execute("select name from sqlite_master where name = 'rows'").fetchone()
    index.execute(TABLE)
    if not known:
        _take_in(where, index)
    return index


def _take_in(where: Store, index: sqlite3.Connection, stage: str = "*") -> None:
    """Put rows of folders that another machine made, or that a lost index held, into the index."""
    seen = {uri for (uri,) in index.execute("select distinct uri from rows")}
    if where.remote:
        for path in where.remote.list("" if stage == "*" else stage):
            uri, _, name = path.rpartition("/")
            if name == NAMES and uri.count("/") == 2 and uri not in seen:
                where.intact(File(uri=uri, sha256=PurePosixPath(uri).name))
    for folder in where.folders(stage):
        uri, names = folder.relative_to(where.root).as_posix(), folder / NAMES
        if uri not in seen and names.exists():
            _insert(index, File(uri=uri, sha256=folder.name), json.loads(names.read_text()))


def _insert(index: sqlite3.Connection, file: File, keys: Sequence[str]) -> None:
    with index:
        index.executemany(
            "insert or replace into rows values (?, ?, ?, ?)",
            [(key, file.uri, file.sha256, number) for number, key in enumerate(keys)],
        )

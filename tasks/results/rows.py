"""Users one by one: what a batch made for each user is found again, in whatever batch it was.

A stage gives each user of a batch a row key (`key_of` what this user's part depends on), makes the
rows that are not known, and writes all of the batch into one folder, which names its rows
(`rows.json`: their keys, in order).
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache
from glob import glob
from pathlib import Path
from threading import Lock
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
    """The rows that are in the store, by key. A damaged folder counts as absent.

    A greedy choice keeps the folders few: those with the most of the rows are read first. A folder
    that is only at a URL is fetched when it is read.
    """
    files, known = store(), dict[str, Row]()
    index, wanted = _index(files.root, stage), defaultdict[str, list[str]](list)
    index.update(files)
    for key in set(keys):
        for uri in index.uris.get(key, ()):
            wanted[uri].append(key)
    for uri, keys_there in sorted(wanted.items(), key=lambda one: (-len(one[1]), one[0])):
        new = [key for key in keys_there if key not in known]
        file = File(uri=uri, sha256=Path(uri).name)
        if new and files.intact(file):
            rows, names = read(file), json.loads((files.root / uri / ROWS).read_bytes())
            numbers = {key: number for number, key in enumerate(names)}
            known |= {key: rows[numbers[key]] for key in new}
    return known


class _Index:
    """Which folders of a stage have which rows: a folder is read once, as its content stays.

    uris: by key. A batch asks for its own keys alone, so that it costs as much as its users,
    however many came before; only the names of folders are listed each time.
    """

    def __init__(self, stage: str) -> None:
        self.stage, self.uris = stage, dict[str, tuple[str, ...]]()
        self._seen, self._lock = set[str](), Lock()

    def update(self, store: Store) -> None:
        """Read which rows are in folders that are new, here or at the URL."""
        with self._lock:
            here = {*glob(f"{self.stage}/??/*", root_dir=store.root)}
            texts = {uri: _text(store.root / uri / ROWS) for uri in here - self._seen}
            if store.remote:
                paths = (path.rpartition("/") for path in store.remote.list(self.stage))
                there = {uri for uri, _, name in paths if name == ROWS and uri.count("/") == 2}
                new = sorted(f"{uri}/{ROWS}" for uri in there - here - self._seen)
                texts |= {path[: -len(ROWS) - 1]: b for path, b in store.remote.read(new).items()}
            for uri, text in texts.items():
                with suppress(ValueError):  # one that names no rows has none
                    names, alone = json.loads(text), (uri,)
                    for key in names:
                        before = self.uris.get(key)
                        self.uris[key] = (*before, uri) if before else alone
                    self._seen.add(uri)


@cache
def _index(_root: Path, stage: str) -> _Index:
    return _Index(stage)


def _text(path: Path) -> bytes:
    """A file's bytes; none where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""

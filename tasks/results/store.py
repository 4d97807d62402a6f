"""The store: files of results, by their content.

    <store>/<stage>/<sha256[:2]>/<sha256>/...    what one piece of work wrote
    <store>/results/<stage>-<key>                what stages gave, kept by Prefect (stage.py)
    <store>/rows.sqlite                          what was made user by user (rows.py)
    <store>/memo/<kind>-<key>.json               small values (memo.py)
    <store>/.making, <store>/.locks              work under way

`MTA_STORE` is a folder or an fsspec URL (s3://bucket/prefix). At a URL the same layout lies there,
and `MTA_STORE_CACHE` is the folder of this machine that files are fetched into.

A folder is written in `.making` and renamed into its place, so it is there whole or not at all.
Whoever reads a file looks at its hash first (`path`).
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tasks.errors import InputError
from tasks.files import PARTIAL, fsync, sha256_of
from tasks.record import File
from tasks.results.remote import Remote

MAKING = ".making"
LOCKS = ".locks"
MEMO = "memo"
RESULTS = "results"
# The folders beside the store that files are written into.
BESIDE = ("checkpoints", "reports", "runs")
# Places that begin so are folders.
FOLDER_URLS = ("file://", "local://")
# A half-written small file that is older was left by a process that was killed.
STALE_SECONDS = 3600.0


class Folder:
    """A folder that is being filled; `file` refers to what is in it once it is stored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stored: tuple[str, Path] | None = None

    def file(self, name: str = "") -> File:
        """A file in the folder, or a folder in it; without a name the whole."""
        if self._stored is None:
            raise RuntimeError("the folder is not stored yet")
        uri, place = self._stored
        return File(uri=f"{uri}/{name}".rstrip("/"), sha256=sha256_of(place / name))

    def has(self, name: str) -> bool:
        """Whether there is such a file in the stored folder."""
        return self._stored is not None and (self._stored[1] / name).exists()

    def stored(self, uri: str, place: Path) -> None:
        self._stored = (uri, place)


class Store:
    """The files under one folder, `root`; with `remote`, `root` is the cache of what lies there."""

    def __init__(self, root: Path, remote: Remote | None = None) -> None:
        self.root = root
        self.remote = remote

    @property
    def state(self) -> Path:
        """The folder beside the store: runs, reports, checkpoints, servers."""
        return self.root.parent

    @contextmanager
    def new(self, stage: str) -> Iterator[Folder]:
        """A fresh folder; what stands in it at the end of the block is stored."""
        making = self.root / MAKING
        making.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        lock = _lock(making / f"{name}.lock")
        with lock:
            folder = Folder(making / name)
            folder.path.mkdir()
            try:
                yield folder
                self._put(stage, folder)
            finally:
                shutil.rmtree(making / name, ignore_errors=True)
                Path(lock.lock_file).unlink(missing_ok=True)

    def _put(self, stage: str, folder: Folder) -> None:
        content = sha256_of(folder.path)
        uri = f"{stage}/{content[:2]}/{content}"
        place = self.root / uri
        for path in (*folder.path.rglob("*"), folder.path):
            fsync(path)
        if self.remote:
            self.remote.upload(folder.path, uri)  # first, so that what lies here lies there too
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and sha256_of(place) != content:
            shutil.rmtree(place)  # damaged, and made again
        try:
            folder.path.rename(place)
        except OSError:
            # Another process stored the same content meanwhile.
            if not place.exists():
                raise
        fsync(place.parent)
        folder.stored(uri, place)

    def path(self, file: File) -> Path:
        """Where a file lies on this machine, its content verified.

        Raises InputError where it is gone or damaged.
        """
        if not self.intact(file):
            raise InputError(
                f"store: {file.uri} is gone or damaged since it was made; start the run again"
            )
        return self.root / file.uri

    def intact(self, file: File) -> bool:
        """Whether a file is there as it was made; fetched where it lies at a URL only."""
        place = self.root / file.uri
        if _matches(place, file):
            return True
        if self.remote is None:
            return False
        locks = self.root / LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        # Of several jobs on this machine that need it, one fetches it.
        with _lock(locks / f"{file.folder.replace('/', '-')}.lock"):
            if not _matches(place, file):
                folder = self.root / file.folder
                shutil.rmtree(folder, ignore_errors=True)
                self.remote.download(file.folder, folder)
            return _matches(place, file)

    def folders(self, stage: str = "*") -> list[Path]:
        """All folders of a stage, or of every stage, that lie on this machine."""
        return sorted(path for path in self.root.glob(f"{stage}/??/*") if path.is_dir())

    def remove(self, path: Path) -> None:
        """Remove a file or a stored folder, at the URL too. Here nobody finds half a folder."""
        if self.remote:
            self.remote.remove(path.relative_to(self.root).as_posix())
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        gone = self.root / MAKING / uuid.uuid4().hex
        lock = gone.with_suffix(".lock")
        gone.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()  # where this process is killed `sweep` removes the rest
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        lock.unlink()

    def fetch_all(self) -> None:
        """Have all that the store holds on this machine."""
        if self.remote:
            # They are written over at the URL where a stage is made again.
            shutil.rmtree(self.root / RESULTS, ignore_errors=True)
            self.remote.download("", self.root)

    def sweep(self) -> None:
        """Remove what processes that were killed left half made; and from the cache of a URL what
        was removed there.

        Raises StorageError where nothing can be written at the URL.
        """
        for lock in (self.root / MAKING).glob("*.lock"):
            if _free(lock):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
        # Only here: other programs may have files beside the store, and any number of them.
        for folder in (self.root / MEMO, *(self.state / name for name in BESIDE)):
            for left in folder.rglob(f"{PARTIAL}*"):
                with suppress(FileNotFoundError):
                    if time.time() - left.stat().st_mtime > STALE_SECONDS:
                        left.unlink()
        if self.remote:
            self.remote.check()
            # In this order: what is stored meanwhile lies there before it lies here.
            here = self.folders()
            there = {"/".join(path.split("/")[:3]) for path in self.remote.list()}
            for folder in here:
                if folder.relative_to(self.root).as_posix() not in there:
                    shutil.rmtree(folder, ignore_errors=True)

    def working(self) -> list[Path]:
        """The locks that a process of this machine holds just now: runs are under way."""
        locks = [*(self.root / MAKING).glob("*.lock"), *(self.root / LOCKS).glob("*.lock")]
        return [lock for lock in sorted(locks) if not _free(lock)]


def store() -> Store:
    """The store of this process: `MTA_STORE`, a folder or a URL; else `.mta/store` below here.

    Raises InputError for a URL that nothing here can read.
    """
    return store_at(store_place())


def store_place() -> str:
    """Where the store is, for any process of any machine: a URL, or a whole path."""
    place = os.environ.get("MTA_STORE", ".mta/store")
    return str(store_folder(place) or place)


def store_at(place: str) -> Store:
    """The store in a folder (`file://` is one), or at an fsspec URL."""
    if folder := store_folder(place):
        return Store(folder)
    cache = Path(os.environ.get("MTA_STORE_CACHE", ".mta/cache")).absolute()
    return Store(cache, Remote(place))


def store_folder(place: str) -> Path | None:
    """The folder that a place of a store names, by a path or as `file:///path`; None for a URL.

    Raises InputError for a `file://` without a whole path.
    """
    protocol, divided, path = place.partition("://")
    if not divided:
        return Path(place).absolute()
    if not place.startswith(FOLDER_URLS):
        return None
    if not path.startswith("/"):
        raise InputError(f"MTA_STORE {place}: write a whole path: {protocol}:///path/of/a/folder")
    return Path(path)


def _matches(place: Path, file: File) -> bool:
    try:
        return sha256_of(place) == file.sha256
    except FileNotFoundError:
        return False


def _free(lock: Path) -> bool:
    """Whether nobody holds the lock: the system frees it when its holder dies."""
    try:
        with _lock(lock, timeout=0):
            return True
    except Timeout:
        return False


def _lock(file: Path, timeout: float = -1) -> FileLock:
    """A lock that threads and processes wait for, for so many seconds; -1 is for ever."""
    return FileLock(file, timeout=timeout, thread_local=False, is_singleton=False)

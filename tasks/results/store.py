"""The store: files of results, by their content.

    <store>/<stage>/<sha256[:2]>/<sha256>/...    what one piece of work wrote
    <store>/results/<stage>-<key>                what stages gave, kept by Prefect (stage.py)
    <store>/memo/<kind>-<key>.json               small values (`remembered`)
    <store>/.making, <store>/.locks              work under way

`MTA_STORE` is a folder or an fsspec URL (s3://bucket/prefix). At a URL the same layout lies there,
and `MTA_STORE_CACHE` is the folder of this machine that files are fetched into. A folder is renamed
into its place, so it is there whole or not at all; whoever reads a file looks at its hash (`path`).
"""

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tasks.errors import InputError
from tasks.files import PARTIAL, fsync, sha256_of, write_atomic
from tasks.record import File, digest
from tasks.results.remote import Remote

MAKING = ".making"
LOCKS = ".locks"
MEMO = "memo"
RESULTS = "results"
# In a folder that has users one by one: their keys, in order.
ROWS = "rows.json"
CHECKPOINTS = "checkpoints"
# The folders beside the store that files are written into.
BESIDE = (CHECKPOINTS, "reports", "runs")
# Places that begin so are folders.
FOLDER_URLS = ("file://", "local://")
# A half-written small file that is older was left by a process that was killed.
STALE_SECONDS = 3600.0
# A checkpoint that nobody went on from for so long is of work that nobody wants.
CHECKPOINT_SECONDS = 30 * 24 * 3600.0
# A store in place of that of the environment.
PLACE: ContextVar[str | None] = ContextVar("place", default=None)


@dataclass
class Folder:
    """A folder that is being filled; when it is stored, `path` is its place and `uri` its name."""

    path: Path
    uri: str = ""

    def file(self, name: str = "") -> File:
        """A file in the stored folder, or a folder in it; without a name the whole."""
        if not self.uri:
            raise RuntimeError("the folder is not stored yet")
        return File(uri=f"{self.uri}/{name}".rstrip("/"), sha256=sha256_of(self.path / name))


@dataclass
class Store:
    """The files under one folder, `root`; with `remote`, `root` is the cache of what lies there."""

    root: Path
    remote: Remote | None = None

    @property
    def state(self) -> Path:
        """The folder beside the store: runs, reports, checkpoints, servers."""
        return self.root.parent

    @property
    def checkpoints(self) -> Path:
        """Where trainings keep their state (tasks/model.py); it is no result."""
        return self.state / CHECKPOINTS

    @contextmanager
    def new(self, stage: str, rows: Sequence[str] | None = None) -> Iterator[Folder]:
        """A fresh folder; what stands in it at the end of the block is stored.

        rows: the keys of the rows that it will hold (rows.py).
        """
        with self._aside() as path:
            path.mkdir()
            if rows is not None:
                (path / ROWS).write_text(json.dumps(list(rows)))
            folder = Folder(path)
            yield folder
            content = sha256_of(path)
            folder.uri = f"{stage}/{content[:2]}/{content}"
            folder.path = self.root / folder.uri
            for one in (*path.rglob("*"), path):
                fsync(one)
            if self.remote:
                self.remote.upload(path, folder.uri)  # first: what is here is at the URL, too
            folder.path.parent.mkdir(parents=True, exist_ok=True)
            if folder.path.exists() and sha256_of(folder.path) != content:
                shutil.rmtree(folder.path)  # damaged, and made again
            try:
                path.rename(folder.path)
            except OSError:
                # Another process stored the same content meanwhile.
                if not folder.path.exists():
                    raise
            fsync(folder.path.parent)

    @contextmanager
    def _aside(self) -> Iterator[Path]:
        """A path for a folder that nobody finds; `sweep` removes it if this process is killed."""
        path = self.root / MAKING / uuid.uuid4().hex
        with file_lock(path.with_suffix(".lock")) as lock:
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)
                Path(lock.lock_file).unlink(missing_ok=True)

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
        # Of several jobs on this machine that need it, one fetches it.
        with file_lock(self.root / LOCKS / f"{file.folder.replace('/', '-')}.lock"):
            if not _matches(place, file):
                folder = self.root / file.folder
                shutil.rmtree(folder, ignore_errors=True)
                self.remote.download(file.folder, folder)
            return _matches(place, file)

    def bring(self, file: File, get: Callable[[Path], Path]) -> None:
        """Fetch a file from elsewhere: `get` writes it below a folder, and gives its path.

        Raises InputError where its content is another.
        """
        if self.intact(file):
            return
        place = self.root / file.uri
        with self._aside() as scratch:
            scratch.mkdir()
            made = get(scratch)
            if not _matches(made, file):
                raise InputError(f"{file.uri}: is damaged where it was fetched from")
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.exists():
                self.remove(place)  # damaged
            made.rename(place)

    def folders(self, stage: str = "*") -> list[Path]:
        """All folders of a stage, or of every stage, that lie on this machine."""
        return sorted(path for path in self.root.glob(f"{stage}/??/*") if path.is_dir())

    def remove(self, path: Path) -> None:
        """Remove a file or a stored folder, at the URL too. Nobody finds half a folder here."""
        if self.remote:
            self.remote.remove(path.relative_to(self.root).as_posix())
        if path.is_dir():
            with self._aside() as gone:
                path.rename(gone)
        else:
            path.unlink(missing_ok=True)

    def fetch_all(self) -> None:
        """Fetch all that the store holds to this machine."""
        if self.remote:
            # At the URL they may have been written over: their stage was run again.
            shutil.rmtree(self.root / RESULTS, ignore_errors=True)
            self.remote.download("", self.root)

    def sweep(self) -> None:
        """Remove what killed processes left half made; from the cache of a URL what is gone there.

        Raises StorageError where nothing can be written at the URL.
        """
        for lock in (self.root / MAKING).glob("*.lock"):
            if _free(lock):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
        # In these folders alone: other programs may keep many files beside the store.
        folders = (self.root / MEMO, *(self.state / name for name in BESIDE))
        old = [(file, STALE_SECONDS) for one in folders for file in one.rglob(f"{PARTIAL}*")]
        old += [(file, CHECKPOINT_SECONDS) for file in self.checkpoints.glob("*/*.safetensors")]
        for file, seconds in old:
            with suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > seconds:
                    file.unlink()
        if self.remote:
            self.remote.check()
            # In this order: what is stored meanwhile is at the URL before it is here.
            here = self.folders()
            there = {"/".join(path.split("/")[:3]) for path in self.remote.list()}
            for folder in here:
                if folder.relative_to(self.root).as_posix() not in there:
                    shutil.rmtree(folder, ignore_errors=True)

    def working(self) -> list[Path]:
        """The locks that processes of this machine hold now: runs are under way."""
        locks = [*(self.root / MAKING).glob("*.lock"), *(self.root / LOCKS).glob("*.lock")]
        return [lock for lock in sorted(locks) if not _free(lock)]


@contextmanager
def reading_from(root: Path) -> Iterator[None]:
    """Within the block the store is this folder, whatever the environment says."""
    token = PLACE.set(str(root))
    try:
        yield
    finally:
        PLACE.reset(token)


def store(place: str | None = None) -> Store:
    """The store at a place (`store_place`). Raises InputError for a URL that nothing here reads."""
    place = store_place(place)
    if "://" not in place:
        return Store(Path(place))
    cache = Path(os.environ.get("MTA_STORE_CACHE", ".mta/cache")).absolute()
    return Store(cache, Remote(place))


def store_place(place: str | None = None) -> str:
    """Where a store is, for any process of any machine: an fsspec URL, or a whole path.

    place: a path, `file:///path` or a URL; else PLACE, `MTA_STORE` or `.mta/store`. Raises
    InputError for a `file://` without a whole path.
    """
    place = place or PLACE.get() or os.environ.get("MTA_STORE", ".mta/store")
    protocol, divided, path = place.partition("://")
    if not divided:
        return str(Path(place).absolute())
    if not place.startswith(FOLDER_URLS):
        return place
    if not path.startswith("/"):
        raise InputError(f"MTA_STORE {place}: write a whole path: {protocol}:///path/of/a/folder")
    return path


def remembered(kind: str, about: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives, ready for JSON: made once for each value of `about`."""
    path = store().root / MEMO / f"{kind}-{digest(about)}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(made, ensure_ascii=False).encode())
        return made


def _matches(place: Path, file: File) -> bool:
    try:
        return sha256_of(place) == file.sha256
    except FileNotFoundError:
        return False


def _free(lock: Path) -> bool:
    """Whether nobody holds the lock: the system frees it when its holder dies."""
    try:
        with file_lock(lock, timeout=0):
            return True
    except Timeout:
        return False


def file_lock(file: Path, timeout: float = -1) -> FileLock:
    """A lock that threads and processes wait for, for so many seconds; -1 is for ever."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file, timeout=timeout, thread_local=False, is_singleton=False)

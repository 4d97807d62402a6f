"""The store at a URL, with a cache of whole pieces on this machine.

    <url>/<stage>/<key[:2]>/<key>/record.json       and each file under its sha256
    <cache>/<stage>/<key[:2]>/<key>/                as in a local store

A piece is looked for in the cache, then fetched: its files are verified and it is renamed into
place. A piece is made in the cache, as without a URL, and then uploaded: its files, each under its
hash, so that two who upload at once cannot mix theirs; its record last. So it is there whole or not
at all. Until it is uploaded the cache keeps a mark beside it, and whoever finds it uploads it: what
was made while the storage did not answer is not lost.

`sweep`, at the start of a run, removes from the cache what the storage has no more (a user was
forgotten, elsewhere), and uploads what is marked.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from tasks.store.artifacts import CLAIMS_FOLDER, MAKING, Store
from tasks.store.claims import Claims
from tasks.store.files import file_sha256, fsync
from tasks.store.pieces import RECORD, Piece, row_keys
from tasks.store.processes import own_prefix
from tasks.store.storage import MARKER, Storage

# Beside the stages of the cache: what is to be uploaded, and records of pieces that are not here.
UPLOADS = ".uploads"
RECORDS = ".records"


class StorageBoard:
    """Claims as files of a storage (claims.py)."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.place = f"{storage.url}/{CLAIMS_FOLDER}"
        self.poll = 0.1 if storage.near else 1.0

    def stages(self) -> list[str]:
        found = self.storage.files(CLAIMS_FOLDER)
        return sorted({path.split("/")[1] for path in found if path.count("/") == 2})

    def names(self, stage: str) -> list[str]:
        return [path.rsplit("/", 1)[1] for path in self.storage.files(f"{CLAIMS_FOLDER}/{stage}")]

    def read(self, stage: str, name: str) -> bytes | None:
        return self.storage.read(f"{CLAIMS_FOLDER}/{stage}/{name}")

    def write(self, stage: str, name: str, text: bytes) -> None:
        self.storage.write(f"{CLAIMS_FOLDER}/{stage}/{name}", text)

    def remove(self, stage: str, name: str) -> None:
        self.storage.remove(f"{CLAIMS_FOLDER}/{stage}/{name}")


class RemoteStore(Store):
    """The pieces at a URL; `root` is the cache.

    Methods raise InputError, besides what they say, where the storage cannot be used.
    """

    def __init__(
        self, storage: Storage, cache: Path, warn: Callable[[str], None] = lambda _line: None
    ) -> None:
        super().__init__(cache, warn)
        self.storage = storage
        self.claims = Claims(StorageBoard(storage), warn)

    def find(self, stage: str, key: str) -> Piece | None:
        """As in a local store; fetched where it is not in the cache."""
        if piece := super().find(stage, key):
            if self._mark(stage, key).exists():
                self._upload(stage, key)
            return piece
        return super().find(stage, key) if self._fetch(stage, key) else None

    def make(self, stage: str, key: str, make: Callable[[Path], dict[str, Any]]) -> Piece:
        """As in a local store, and uploaded. Where that fails, the next run uploads it."""
        mark = self._mark(stage, key)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        made = super().make(stage, key, make)
        if self._upload(stage, key) and (theirs := super().find(stage, key)):
            return replace(theirs, cached=False)
        return made

    def remove(self, stage: str, key: str) -> None:
        """Out of the storage, its record first, and out of the cache."""
        place = self._path(stage, key)
        self.storage.remove(f"{place}/{RECORD}")
        for path in self.storage.files(place):
            self.storage.remove(path)
        self._kept(stage, key).unlink(missing_ok=True)
        self._mark(stage, key).unlink(missing_ok=True)
        if self._place(stage, key).exists():
            super().remove(stage, key)

    def sweep(self) -> None:
        """Also: upload what was not, and remove from the cache what the storage has no more."""
        self.storage.check()
        super().sweep()
        marked = self._marked()
        for stage, key in marked:
            if self._place(stage, key).exists():
                self._upload(stage, key)
        # In this order: what is in the cache by now is marked, or in the storage by then, or it was
        # removed there. A run of this machine may be uploading all the while.
        here = [*self._here(), *self._records_here()]
        waiting = set(marked) | set(self._marked())
        there = self._there()
        for stage, key in here:
            if (stage, key) not in there and (stage, key) not in waiting:
                shutil.rmtree(self._place(stage, key), ignore_errors=True)
                self._kept(stage, key).unlink(missing_ok=True)

    def fetch_all(self) -> None:
        """Have every piece in the cache, and no half of one in the storage. Nobody may be at work.

        For who has to look into all of them (tasks/forget/user.py).
        """
        self.sweep()
        there = self._there()
        for path in self.storage.files():
            parts = path.split("/")
            if len(parts) == 4 and (parts[0], parts[2]) not in there:
                self.storage.remove(path)
        for stage, key in sorted(there - set(self._here())):
            self._fetch(stage, key)

    def _rows(self, stage: str) -> Iterator[tuple[str, list[str]]]:
        """Those in the cache, and those of the storage, which are fetched once and kept."""
        here = {path.parent.name for path in (self.root / stage).glob(f"*/*/{RECORD}")}
        wanted = sorted({key for _, key in self._there(stage)} - here)
        missing = [key for key in wanted if not self._kept(stage, key).exists()]
        for path, text in self.storage.read_all(
            [f"{self._path(stage, key)}/{RECORD}" for key in missing]
        ).items():
            _write(self._kept(stage, path.split("/")[2]), text)
        yield from super()._rows(stage)
        for key in wanted:
            try:
                yield key, row_keys(self._kept(stage, key))
            except OSError:
                continue

    def _fetch(self, stage: str, key: str) -> bool:
        """Whether the storage has the piece, which is then in the cache.

        Of a damaged one the record is removed, if it is still the one that was looked at: the files
        are written over by whoever makes the piece again, who may be at it.
        """
        record = f"{self._path(stage, key)}/{RECORD}"
        text = self.storage.read(record)
        while text is not None:
            problem = self._fetched(stage, key, text)
            if problem is None:
                return True
            now = self.storage.read(record)
            if now == text:
                self.warn(
                    f"store: {stage}/{key[:12]}: {problem} at {self.storage.url}; this piece is "
                    "made again"
                )
                self.storage.remove(record)
                self._kept(stage, key).unlink(missing_ok=True)
                return False
            text = now
        return False

    def _fetched(self, stage: str, key: str, record: bytes) -> str | None:
        """Put the piece of a record of the storage in its place; what is wrong with it, or None."""
        place = self._place(stage, key)
        place.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=own_prefix(MAKING), dir=place.parent))
        try:
            if problem := self._download(self._path(stage, key), record, work):
                return problem
            (work / RECORD).write_bytes(record)
            for file in (*work.rglob("*"), work):
                fsync(file)
            try:
                work.rename(place)
            except OSError:
                # Another process of this machine fetched it meanwhile.
                if not place.exists():
                    raise
            return None
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _download(self, path: str, record: bytes, work: Path) -> str | None:
        """The files of a piece into `work`; what is wrong with it, or None."""
        try:
            files: dict[str, str] = json.loads(record)["files"]
            targets = {name: _inside(work, name) for name in files}
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{RECORD} cannot be understood"
        for name, sha256 in files.items():
            target = targets[name]
            target.parent.mkdir(parents=True, exist_ok=True)
            if not self.storage.download(f"{path}/{sha256}", target):
                return f"{name} is missing"
            if file_sha256(target) != sha256:
                return f"{name} does not match its hash"
        return None

    def _upload(self, stage: str, key: str) -> bool:
        """Whether another machine's piece stands in the place of this one now."""
        place, path = self._place(stage, key), self._path(stage, key)
        record = (place / RECORD).read_bytes()
        theirs = self.storage.read(f"{path}/{RECORD}")
        if theirs is not None and theirs != record:
            # Another machine made it, too (see claims.py): theirs stands, if it is whole.
            own = Path(tempfile.mkdtemp(prefix=own_prefix(MAKING), dir=place.parent)) / key
            place.rename(own)
            if self._fetch(stage, key):
                self._mark(stage, key).unlink(missing_ok=True)
                shutil.rmtree(own.parent)
                return True
            own.rename(place)
            own.parent.rmdir()
            theirs = None
        if theirs is None:
            for name, sha256 in json.loads(record)["files"].items():
                self.storage.upload(place / name, f"{path}/{sha256}")
            self.storage.write(f"{path}/{RECORD}", record)
        self._mark(stage, key).unlink(missing_ok=True)
        return False

    def _path(self, stage: str, key: str) -> str:
        return f"{stage}/{key[:2]}/{key}"

    def _mark(self, stage: str, key: str) -> Path:
        return self.root / UPLOADS / f"{stage}~{key}"

    def _kept(self, stage: str, key: str) -> Path:
        return self.root / RECORDS / stage / f"{key}.json"

    def _marked(self) -> list[tuple[str, str]]:
        found = sorted((self.root / UPLOADS).glob("*~*"))
        return [(stage, key) for stage, _, key in (path.name.partition("~") for path in found)]

    def _here(self) -> list[tuple[str, str]]:
        found = self.root.glob(f"*/*/*/{RECORD}")
        return sorted((path.parts[-4], path.parts[-2]) for path in found)

    def _records_here(self) -> list[tuple[str, str]]:
        return [(p.parent.name, p.stem) for p in sorted((self.root / RECORDS).glob("*/*.json"))]

    def _there(self, stage: str = "") -> set[tuple[str, str]]:
        """Stage and key of every piece of the storage."""
        parts = [path.split("/") for path in self.storage.files(stage)]
        return {(p[0], p[2]) for p in parts if len(p) == 4 and p[3] == RECORD and p[0] != MARKER}


def _inside(folder: Path, name: str) -> Path:
    """Where a file of a piece goes. Raises ValueError for a name that leads out of the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or name == RECORD:
        raise ValueError(name)
    return folder / path


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(content)
    scratch.replace(path)

"""Folders at an fsspec URL (s3://bucket/prefix), a file at a time.

What may pass (no answer, a server that is busy) is tried again with growing pauses for
`MTA_STORE_PATIENCE` seconds. What cannot pass (no permission, no such bucket) is a StorageError at
once, in one line.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import fsspec
import tenacity
from fsspec.implementations.dirfs import DirFileSystem

from tasks.errors import DiskFull, InputError, StorageError, disk_full, short, transient

PATIENCE_SECONDS = 300.0
T = TypeVar("T")


class Remote:
    """The storage behind a URL. Paths are relative to it, with slashes."""

    def __init__(self, url: str) -> None:
        self.url, self.patience = url.rstrip("/"), _patience()
        try:
            files, root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            s3 = isinstance(error, ImportError) and url.startswith("s3:")
            extra = " (pip install '.[s3]')" if s3 else ""
            raise InputError(f"MTA_STORE {url}: {error}{extra}") from error
        self.files = DirFileSystem(path=root, fs=files)

    def upload(self, folder: Path, uri: str) -> None:
        """Put a folder's files there; what is there already is written over by the same."""
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            place = f"{uri}/{file.relative_to(folder)}"
            self._try("writing", partial(self.files.put_file, str(file), place))

    def download(self, uri: str, folder: Path) -> None:
        """Get all files below a path into `folder`, but for those that it has; each is whole."""
        for path in self.list(uri):
            target = folder / path.removeprefix(f"{uri}/")
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                scratch = target.with_name(f".{target.name}.{os.getpid()}")
                self._try("reading", partial(self.files.get_file, path, str(scratch)))
                scratch.replace(target)

    def list(self, uri: str = "") -> list[str]:
        """The paths of all files below a path. One that leads out of the store is left out."""

        def call() -> list[str]:
            try:
                return sorted(self.files.find(uri))
            except FileNotFoundError:
                return []

        return [path for path in self._try("listing", call) if ".." not in path.split("/")]

    def read(self, paths: Sequence[str]) -> dict[str, bytes]:
        """What is in these files, by path; none of them where one is gone meanwhile."""

        def call() -> dict[str, bytes]:
            try:
                contents: dict[str, bytes] = self.files.cat([*paths]) if paths else {}
            except FileNotFoundError:
                return {}
            return contents

        return self._try("reading", call)

    def remove(self, uri: str) -> None:
        """Remove a file, or all files below a path."""
        for path in self.list(uri):
            self._try("removing", partial(self.files.rm_file, path))

    def check(self) -> None:
        """Leave one small file. Raises StorageError where nothing can be written."""
        text = b"A store of MTA: docs/storage.md\n"
        self._try("writing", lambda: self.files.pipe_file(".mta-store", text))

    def _try(self, doing: str, call: Callable[[], T]) -> T:
        asking = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            stop=tenacity.stop_after_delay(self.patience),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=30.0),
            reraise=True,
        )
        try:
            return asking(call)
        except Exception as error:
            if line := disk_full(error):
                raise DiskFull(f"{self.url}: {doing} failed: {line}") from error
            why = short(error) or type(error).__name__
            raise StorageError(
                f"{self.url}: {doing} failed ({why}); check MTA_STORE, permissions and credentials"
            ) from error


def _may_pass(error: BaseException) -> bool:
    """Whether asking again may help."""
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError):
        return False
    return transient(error) or (isinstance(error, OSError) and not disk_full(error))


def _patience() -> float:
    text = os.environ.get("MTA_STORE_PATIENCE", "").strip() or str(PATIENCE_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InputError(f"MTA_STORE_PATIENCE must be a number of seconds, got {text!r}")
    return seconds

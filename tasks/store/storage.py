"""Files at an fsspec URL (s3://bucket/prefix, memory://x, ...), asked with patience.

What may pass (no answer, a server that is busy) is tried again with growing pauses for
`MTA_STORE_PATIENCE` seconds, 300 unless told. What cannot pass (no permission, no such bucket, a
full disk, a library that is missing) is an InputError at once: one line.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import tenacity

from tasks.errors import InputError, StorageError
from tasks.running.faults import DiskFull, chain, disk_full

PATIENCE = "MTA_STORE_PATIENCE"
PATIENCE_SECONDS = 300.0
LONGEST_PAUSE = 30.0
MARKER = ".mta-store"
# OSErrors that stay however often one asks.
LASTING = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENOSYS, errno.ENAMETOOLONG,
    errno.ENOTDIR, errno.EISDIR, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
}  # fmt: skip
# Errors of the network that are no OSErrors, by name: the libraries may not be installed.
PASSING = {
    "ConnectionError", "HTTPClientError",  # botocore: no connection, time-outs, one that breaks off
    "ResponseParserError",  # botocore: half an answer
    "ClientConnectionError", "ClientPayloadError",  # aiohttp
    "IncompleteRead",  # http.client
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    # The pauses are ours, else botocore's, s3fs' and these would multiply.
    "s3": {"config_kwargs": {"retries": {"max_attempts": 1}}},
}
T = TypeVar("T")


class Storage:
    """A folder of files at a URL. Paths are relative to it, with slashes.

    Every method raises StorageError, in one line, where the storage cannot be used.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.patience = _patience()
        protocol = fsspec.utils.get_protocol(url)
        try:
            options = OPTIONS.get(protocol, {})
            self.fs, self.root = fsspec.url_to_fs(self.url, use_listings_cache=False, **options)
        except ImportError as error:
            extra = " (pip install '.[s3]')" if protocol == "s3" else ""
            raise InputError(f"MTA_STORE {url}: {error}{extra}") from error
        except ValueError as error:
            raise InputError(f"MTA_STORE {url}: {error}") from error
        # Another look at what is far away costs a request.
        self.near = not getattr(self.fs, "async_impl", False)

    def check(self) -> None:
        """Whether this can be written and read at all; leaves one small file."""
        self.write(MARKER, b"A store of MTA: docs/storage.md\n")
        if self.read(MARKER) is None:
            raise InputError(f"{self.url}: what was written cannot be read back")

    def read(self, path: str) -> bytes | None:
        """A file's bytes, None where there is none."""

        def call() -> bytes | None:
            try:
                return bytes(self.fs.cat_file(self._at(path)))
            except FileNotFoundError:
                return None

        return self._try("reading", call)

    def read_all(self, paths: list[str]) -> dict[str, bytes]:
        """Many small files at once; those that are gone are left out."""
        if not paths:
            return {}

        def call() -> dict[str, bytes]:
            found = self.fs.cat([self._at(path) for path in paths], on_error="return")
            # A file system answers by full paths, in a spelling of its own.
            by_path = {self._relative(full): content for full, content in found.items()}
            for content in by_path.values():
                if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                    raise content
            return {path: text for path, text in by_path.items() if isinstance(text, bytes)}

        return self._try("reading", call)

    def write(self, path: str, content: bytes) -> None:
        self._try("writing", lambda: self.fs.pipe_file(self._at(path), content))

    def upload(self, file: Path, path: str) -> None:
        self._try("writing", lambda: self.fs.put_file(str(file), self._at(path)))

    def download(self, path: str, file: Path) -> bool:
        """Into `file`; False where there is none."""

        def call() -> bool:
            try:
                self.fs.get_file(self._at(path), str(file))
            except FileNotFoundError:
                return False
            return True

        return self._try("reading", call)

    def files(self, folder: str = "") -> list[str]:
        """The paths of all files in a folder and below."""

        def call() -> list[str]:
            try:
                return sorted(map(self._relative, self.fs.find(self._at(folder))))
            except FileNotFoundError:
                return []

        return self._try("listing", call)

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""

        def call() -> None:
            try:
                self.fs.rm_file(self._at(path))
            except FileNotFoundError:
                return

        self._try("removing", call)

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}" if path else str(self.root)

    def _relative(self, full: str) -> str:
        return str(self.fs._strip_protocol(full)).removeprefix(f"{self.root}/")

    def _try(self, doing: str, call: Callable[[], T]) -> T:
        asking = tenacity.Retrying(
            retry=tenacity.retry_if_exception(may_pass),
            stop=tenacity.stop_after_delay(self.patience),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE),
            reraise=True,
        )
        try:
            return asking(call)
        except InputError:
            raise
        except Exception as error:
            if line := disk_full(error):
                raise DiskFull(f"{self.url}: {doing} failed: {line}") from error
            if not isinstance(error, OSError) and not any(map(_of_storage, chain(error))):
                raise  # a fault of this program keeps its traceback
            raise StorageError(f"{self.url}: {doing} failed: {self._why(error)}") from error

    def _why(self, error: Exception) -> str:
        told = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, FileNotFoundError):
            return f"there is no such bucket or folder ({told}); make it, or correct MTA_STORE"
        if may_pass(error):
            return f"no answer for {self.patience:g} s ({told}); start again when it is back"
        return f"{told}; check MTA_STORE, permissions and credentials (for S3: AWS_*)"


def may_pass(error: BaseException) -> bool:
    """Whether asking again may help."""
    if isinstance(error, (FileNotFoundError, FileExistsError, PermissionError)):
        return False
    if isinstance(error, OSError):
        return error.errno not in LASTING
    return any(cls.__name__ in PASSING for cls in type(error).__mro__)


def _of_storage(error: BaseException) -> bool:
    modules = {cls.__module__.split(".")[0] for cls in type(error).__mro__}
    return not modules.isdisjoint({"botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs"})


def _patience() -> float:
    text = os.environ.get(PATIENCE, "").strip()
    try:
        seconds = float(text) if text else PATIENCE_SECONDS
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InputError(f"{PATIENCE} must be a number of seconds, got {text!r}")
    return seconds

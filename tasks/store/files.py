"""Files of the store and the downloads: where they are, their hash, getting them onto the disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from tasks.errors import InputError
from tasks.store.processes import own_prefix

# In front of whose it is (processes.py): a file that is being written.
PARTIAL = ".partial-"
# Places that begin so are folders.
FOLDER_URLS = ("file://", "local://")


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


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """What was written to a file, or which names a folder has, is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """`data` as the file `path`, on the disk when this returns: whole, or as it was before.

    The folder must be there. A process that is killed leaves a file `.partial-...`.
    """
    handle, name = tempfile.mkstemp(prefix=own_prefix(PARTIAL), dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    fsync(path.parent)

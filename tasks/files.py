"""Files on the disk: their hash, and writing them whole or not at all."""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

# The name of a file that is being written begins so. A killed process leaves one behind.
PARTIAL = ".partial-"


def file_sha256(path: Path) -> str:
    """sha256 over a file's bytes; read again only when its size or times have changed."""
    stat = path.stat()
    return _sha256(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@cache
def _sha256(path: Path, *_stat: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(path: Path) -> str:
    """sha256 of a file, or of a folder: over the names and hashes of all files in it.

    Raises FileNotFoundError where there is neither.
    """
    try:
        return file_sha256(path)
    except IsADirectoryError:  # not asked before: another job may be fetching the folder
        pass
    total = hashlib.sha256()
    for file in sorted(one for one in path.rglob("*") if one.is_file()):
        total.update(f"{file_sha256(file)} {file.relative_to(path).as_posix()}\n".encode())
    return total.hexdigest()


def file_name(identifier: str) -> str:
    """A file name for an id, which may be any text.

    One that is long or no plain name gets a piece of its sha256, so that two ids keep two names.
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", identifier).strip("-.")[:60]
    if plain == identifier:
        return plain
    mark = hashlib.sha256(identifier.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain}-{mark}".lstrip("-")


def fsync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` as the file `path`, whole or not at all. Its folder must exist."""
    handle, name = tempfile.mkstemp(prefix=PARTIAL, dir=path.parent)
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


def locked(file: Path, waiting: Callable[[], None]) -> AbstractContextManager[object]:
    """Hold a lock file; `waiting` is called first where another process holds it.

    The system frees it when its holder ends.
    """
    lock = FileLock(file)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        waiting()
        return lock.acquire()

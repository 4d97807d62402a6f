"""Which errors are tried again, and which stop a run."""

from __future__ import annotations

import errno
import resource
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pytest
import requests
import torch
from mlflow.exceptions import MlflowException, RestException
from prefect.exceptions import PrefectHTTPStatusError
from safetensors import SafetensorError
from safetensors.torch import save_file

from tasks.errors import DiskFull, InputError, chain, disk_full, transient
from tasks.files import write_atomic
from tasks.results.stage import DELAYS
from tasks.results.store import Store


def answered(status: int) -> PrefectHTTPStatusError:
    request = httpx.Request("POST", "http://127.0.0.1:1/api")
    return PrefectHTTPStatusError("no", request=request, response=httpx.Response(status))


def replied(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError("no", response=response)


def raised_instead(inner: Exception, outer: Exception) -> Exception:
    """As `raise outer from None` leaves it: what it was raised because of is hidden."""
    try:
        try:
            raise inner
        except Exception:
            raise outer from None
    except Exception as error:
        return error


def raised_from(inner: Exception, outer: Exception) -> Exception:
    try:
        try:
            raise inner
        except Exception as error:
            raise outer from error
    except Exception as error:
        return error


PASSING = [
    ConnectionRefusedError(111, "Connection refused"),
    TimeoutError("timed out"),
    httpx.ConnectError("All connection attempts failed"),
    httpx.ReadTimeout("slow"),
    requests.ConnectionError("refused"),
    requests.Timeout("slow"),
    answered(500),
    answered(503),
    answered(429),
    replied(502),
    MlflowException("API request failed with exception ..."),
    RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "later"}),
    sqlite3.OperationalError("database is locked"),
    raised_from(httpx.ConnectError("refused"), RuntimeError("no slot")),
]
LASTING = [
    InputError("file x: record 3 has no tag"),
    raised_from(httpx.ConnectError("refused"), InputError("base.model: the hub does not answer")),
    ValueError("a bug"),
    KeyError("a"),
    FileNotFoundError(2, "No such file"),
    PermissionError(13, "Permission denied"),
    torch.OutOfMemoryError("CUDA out of memory"),
    answered(404),
    answered(422),
    replied(403),
    RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "no such parameter"}),
    RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}),
    raised_instead(httpx.ConnectError("refused"), RuntimeError("no slot")),
    raised_instead(OSError(errno.ENOSPC, "No space"), RuntimeError("x")),
]
FULL = [
    (DiskFull("disk full: /x; make room and run it again, what is finished is kept"), "disk full"),
    (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "disk full: [Errno 28] No space"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk full: [Errno 122] Disk quota"),
    (
        OSError(errno.EFBIG, "File too large", "/x/y"),
        "disk full or limited (ulimit -f): [Errno 27] File too large: '/x/y'; make room",
    ),
    (OSError(errno.EROFS, "Read-only file system"), "disk is read-only: [Errno 30] Read-only"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "disk full: I/O error"),
    (sqlite3.OperationalError("database or disk is full"), "disk full: database or disk"),
    (raised_from(OSError(errno.ENOSPC, "No space"), RuntimeError("x")), "disk full: [Errno 28] No"),
    (raised_from(OSError(errno.ENOSPC, "No space"), InputError("x")), "disk full: [Errno 28] No"),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_passes(error: Exception) -> None:
    assert transient(error)
    assert disk_full(error) is None


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_lasts(error: Exception) -> None:
    assert not transient(error)
    assert disk_full(error) is None


@pytest.mark.parametrize(("error", "line"), FULL, ids=str)
def test_a_full_disk(error: Exception, line: str) -> None:
    assert not transient(error)
    said = disk_full(error) or ""
    assert said.startswith(line)
    assert said.endswith("make room and run it again, what is finished is kept")
    assert "\n" not in said


def test_a_chain_is_what_a_traceback_shows() -> None:
    """From a cause, else what was being handled; neither behind `from None`, nor in a circle."""
    first, second, third = ValueError("1"), KeyError("2"), OSError("3")
    raised_from(first, second)
    assert list(chain(second)) == [second, first]
    raised_instead(second, third)
    assert third.__context__ is second
    assert list(chain(third)) == [third]
    second.__cause__, first.__context__ = None, second
    second.__context__, second.__suppress_context__ = first, False
    assert list(chain(second)) == [second, first]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    size = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", *size], check=False, capture_output=True).returncode
    ):
        pytest.skip("a tmpfs cannot be mounted here (it takes root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


LARGE = 300_000
WRITERS: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda path: save_file({"x": torch.zeros(LARGE)}, path),
    "parquet": lambda path: pl.DataFrame({"x": np.random.rand(LARGE)}).write_parquet(path),
    "plain": lambda path: path.write_bytes(b"x" * LARGE),
    "atomic": lambda path: write_atomic(path, b"x" * LARGE),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_libraries_raise_on_a_disk_that_is_full(small_disk: Path, writer: str) -> None:
    try:
        WRITERS[writer](small_disk / "file")
    except Exception as error:
        line = disk_full(error) or repr(error)
    else:
        line = "written"
    assert line.startswith("disk full: ")


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writer", WRITERS)
def test_what_libraries_raise_where_files_may_not_grow(tmp_path: Path, writer: str) -> None:
    line = "written"
    with limited(64 << 10):
        try:
            WRITERS[writer](tmp_path / "file")
        except Exception as error:
            line = disk_full(error) or repr(error)
    assert line.startswith("disk full or limited (ulimit -f): ")


def test_the_store_on_a_disk_that_is_full(small_disk: Path) -> None:
    """What was half-written is gone, so that others have room."""
    where = Store(small_disk / "store")

    def write(size: int) -> None:
        with where.new("demo") as folder:
            (folder.path / "small").write_bytes(b"x")
            (folder.path / "large").write_bytes(b"x" * size)

    write(1000)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(LARGE)
    assert (disk_full(caught.value) or "").startswith("disk full: [Errno 28] No space left")
    files = sorted(path.name for path in small_disk.rglob("*") if path.is_file())
    assert files == ["large", "small"]
    write(2000)
    assert len(where.folders("demo")) == 2


def test_a_server_may_be_away_for_more_than_a_minute() -> None:
    assert sum(DELAYS) > 60

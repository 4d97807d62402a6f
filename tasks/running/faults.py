"""Which errors pass, so that trying again helps, and which stop a run: a disk that is full."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import httpx

from tasks.errors import InputError, short

# How long a stage waits before it tries again, in seconds; with those of Prefect's own client a
# server may be away for some minutes.
DELAYS = [2.0, 10.0, 30.0, 60.0]
# The name of the state of a stage or a run that ended for want of disk, and how its line begins.
DISK_FULL = "DiskFull"
# What a file is not let grow beyond: a limit of the process, or of the file system.
_LIMITED = "disk full or limited (ulimit -f)"
_FULL = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk full",
    errno.EFBIG: _LIMITED,
    errno.EROFS: "disk is read-only",
}
# As libraries say it that do not raise OSError: Rust's (safetensors, polars) and sqlite.
_FULL_TEXTS = {
    "(os error 28)": "disk full",
    "(os error 122)": "disk full",
    "(os error 27)": _LIMITED,
    "database or disk is full": "disk full",
    "(os error 30)": "disk is read-only",
    "attempt to write a readonly database": "disk is read-only",
}


class DiskFull(Exception):
    """The run stops: nothing it could still do can be kept. The message is one line."""


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it was raised from or because of, as a traceback would show them.

    What `raise ... from None` hides is left out: who wrote that says that it explains nothing.
    """
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        seen.append(one)
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def disk_full(error: BaseException) -> str | None:
    """One line of what to do where the disk takes no more; None for any other error."""
    if isinstance(error, DiskFull):
        return str(error)
    for one in chain(error):
        found = _FULL.get(one.errno or 0) if isinstance(one, OSError) else None
        if found is None:
            text = str(one)
            found = next((name for part, name in _FULL_TEXTS.items() if part in text), None)
        if found:
            return f"{found}: {short(one)}; make room and run it again, what is finished is kept"
    return None


def transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later: no connection, no answer, a 5xx or 429.

    Never bad input, whatever it was found out by, and never a full disk.
    """
    if isinstance(error, InputError) or disk_full(error):
        return False
    return any(_passes(one) for one in chain(error))


def _passes(error: BaseException) -> bool:
    import requests
    import urllib3

    if isinstance(error, httpx.HTTPStatusError | requests.HTTPError):
        return error.response is not None and _status_passes(error.response.status_code)
    if status := getattr(error, "get_http_status_code", None):  # MLflow's
        return _status_passes(int(status()))
    if "database is locked" in str(error):  # sqlite's, when another process writes
        return True
    kinds = (ConnectionError, TimeoutError, httpx.TransportError, requests.ConnectionError,
             requests.Timeout, urllib3.exceptions.HTTPError)  # fmt: skip
    return isinstance(error, kinds)


def _status_passes(status: int) -> bool:
    return status >= 500 or status in (408, 429)

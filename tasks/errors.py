"""Errors: one clean line for people; which errors pass by themselves; a full disk."""

import errno
import hashlib
import re
from collections.abc import Iterator

# user:password@ of any URL, up to the last @ before the path. MLflow's, Prefect's, a proxy's.
_CREDENTIALS = re.compile(r"(?<=://)[^\s/?#'\"]+@")
LABEL_LENGTH = 80
_FULL = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk full",
    errno.EFBIG: "disk full or limited (ulimit -f)",
    errno.EROFS: "disk is read-only",
}
# In messages of libraries that do not raise OSError: Rust's (safetensors, polars) and sqlite.
_FULL_TEXTS = {f"(os error {code})": name for code, name in _FULL.items()} | {
    "database or disk is full": "disk full",
    "attempt to write a readonly database": "disk is read-only",
}


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the file or option, the record, what was wrong and what to
    do; it shows no password of a URL and no control characters. Commands print it without a
    traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(masked(message)))


class StorageError(InputError):
    """The store's storage cannot be used now: no answer, no permission, no such bucket."""


class DiskFull(Exception):
    """The run stops, since no result can be kept. The message is one line."""


def masked(text: str) -> str:
    """`text` with the user and password of every URL in it as `***`."""
    return _CREDENTIALS.sub("***@", text)


def printable(text: str) -> str:
    """`text` on one line, with an escape in place of each invisible character.

    Such are line ends, NUL, and signs that reorder or hide text (Unicode's Other and Separator).
    """
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape", "backslashreplace").decode()
        for one in text
    )


def short(error: BaseException, length: int = 200) -> str:
    """An error's message as one line of at most `length` characters, to stand in another message.

    Masked before it is cut: a password without the @ behind it would not be recognised.
    """
    return masked(" ".join(str(error).split()))[:length]


def label(identifier: str) -> str:
    """A name for people, in a log or as a tag, for an id of the data, which may be any text.

    A long id is cut and gets a piece of its sha256, so that two ids keep two names.
    """
    shown = printable(identifier)
    if len(shown) <= LABEL_LENGTH:
        return shown
    mark = hashlib.sha256(identifier.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{shown[: LABEL_LENGTH - 12]}...-{mark}"


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, as a traceback shows them."""
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        seen.append(one)
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def disk_full(error: BaseException) -> str | None:
    """What to do, in one line, if the disk is full; None for any other error."""
    if isinstance(error, DiskFull):
        return str(error)
    for one in chain(error):
        names = [name for part, name in _FULL_TEXTS.items() if part in str(one)]
        if isinstance(one, OSError) and one.errno in _FULL:
            names = [_FULL[one.errno]]
        if names:
            return f"{names[0]}: {short(one)}; make room and run it again, what is finished is kept"
    return None


def transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later: no connection, no answer, a 5xx or 429.

    Never for bad input, whatever error lies below it, and never for a full disk.
    """
    if isinstance(error, InputError) or disk_full(error):
        return False
    return any(_passes(one) for one in chain(error))


def _passes(error: BaseException) -> bool:
    import httpx  # here, since the engine does without
    import requests
    import urllib3

    status: int | None = None
    if isinstance(error, httpx.HTTPStatusError | requests.HTTPError):
        status = error.response.status_code if error.response is not None else 400
    elif status_of := getattr(error, "get_http_status_code", None):  # MLflow's
        status = int(status_of())
    if status is not None:
        return status >= 500 or status in (408, 429)
    kinds = (ConnectionError, TimeoutError, httpx.TransportError, requests.ConnectionError,
             requests.Timeout, urllib3.exceptions.HTTPError)  # fmt: skip
    # sqlite raises this while another process writes.
    return isinstance(error, kinds) or "database is locked" in str(error)

"""The exception that speaks to a person, and how strange data is shown: in one clean line."""

from __future__ import annotations

import hashlib
import re

# user:password@ of any URL, up to the last @ before the path. MLflow's, Prefect's, a proxy's.
_CREDENTIALS = re.compile(r"(?<=://)[^\s/?#'\"]+@")
LABEL_LENGTH = 80


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the file or option, the record, what was wrong and
    what to do. Entry points print it without a traceback and exit with a code other than 0.
    Whatever it was made of, it shows no password of a URL and no control characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(masked(message)))


class StorageError(InputError):
    """The storage of the store cannot be used now: no answer, no permission, no such bucket.

    Whether it has what was asked for is not known.
    """


def masked(text: str) -> str:
    """`text` with the user and password of every URL in it as `***`."""
    return _CREDENTIALS.sub("***@", text)


def printable(text: str) -> str:
    """`text` as one line: what is no visible character stands as its escape.

    Line ends, NUL, and signs that reorder or hide text (Unicode categories Other and Separator).
    """
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape", "backslashreplace").decode()
        for one in text
    )


def short(error: BaseException, length: int = 200) -> str:
    """An error's message as one line of at most `length` characters, for within another message.

    Masked before it is cut: a password that has lost its @ is not known as one.
    """
    return masked(" ".join(str(error).split()))[:length]


def label(identifier: str) -> str:
    """An id of the data as a name that people read: a log, a run's name, a tag.

    Ids are data and may be anything. A long one is cut, with a piece of its sha256, so that two ids
    keep two names.
    """
    shown = printable(identifier)
    if len(shown) <= LABEL_LENGTH:
        return shown
    mark = hashlib.sha256(identifier.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{shown[: LABEL_LENGTH - 12]}...-{mark}"

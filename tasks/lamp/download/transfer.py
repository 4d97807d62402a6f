"""One JSON file over HTTP, however often the transfer breaks: resumed, and checked when whole.

What has come lies in `<name>.part`. `<name>.from` (JSON) says what it is a part of: the address,
the server's mark of that content (its strong ETag, else its Last-Modified) and the size. A part
goes on only while all of that still holds (`Range` with `If-Range`, RFC 9110 section 13.1.5);
otherwise it starts again, so that two versions of a file never stand in one.
"""

from __future__ import annotations

import hashlib
import json
import netrc
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from time import sleep

import httpx

from tasks.errors import InputError
from tasks.lamp.download.files import (
    END_BYTES,
    OTHER_WAYS,
    check_json,
    check_start,
    disk_problem,
    ends,
    write_json,
)
from tasks.store.files import fsync

CHUNK_BYTES = 256 * 1024
TIMEOUT_SECONDS = 30.0
# Tries in a row that bring not one new byte; the pause doubles from the first.
ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
# Besides 5xx: what may pass by what the server says.
PASSING = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_EARLY, httpx.codes.TOO_MANY_REQUESTS)
LASTING = (httpx.InvalidURL, httpx.TooManyRedirects, httpx.UnsupportedProtocol)

Say = Callable[[str], None]
# Bytes there are, bytes there will be (None where the server does not say).
Show = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Fetched:
    """A whole file, still in its `.part`, safely on the disk. mark: see the module."""

    part: Path
    sha256: str
    size: int
    mark: str | None


class _Passing(Exception):
    """What a later try may not meet; `pause` is what the server asks for, in seconds."""

    def __init__(self, why: str, pause: float = 0.0) -> None:
        super().__init__(" ".join(why.split()))
        self.pause = pause


def client() -> httpx.Client:
    """Heeds HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY and SSL_CERT_FILE of the environment."""
    try:
        return httpx.Client(
            # Compressed, neither sizes nor ranges would be those of the file.
            headers={"Accept-Encoding": "identity"},
            follow_redirects=True,
            timeout=TIMEOUT_SECONDS,
            auth=_netrc(),
        )
    except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
        why = " ".join(str(error).split())
        raise InputError(
            f"the environment's proxy or certificates cannot be used ({why}); check HTTP_PROXY, "
            "HTTPS_PROXY, ALL_PROXY, NO_PROXY and SSL_CERT_FILE"
        ) from None


def _netrc() -> httpx.NetRCAuth | None:
    """A mirror's user and password, by host, from `NETRC` or ~/.netrc: they stand in no option."""
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if not file.is_file():
        return None
    try:
        return httpx.NetRCAuth(str(file))
    except (netrc.NetrcParseError, UnicodeDecodeError) as error:
        # The parser's message quotes the file.
        raise InputError(
            f"{file}: cannot be read as netrc (line {getattr(error, 'lineno', '?')}); repair it"
        ) from None


def fetch(
    http: httpx.Client, url: str, target: Path, brackets: str, say: Say, show: Show
) -> Fetched:
    """Get `url` as the part of `target`, which itself is not touched.

    brackets: what the file's JSON opens and closes with, "[]" or "{}".
    Raises InputError, in one line, when it cannot be had (at once for what will not pass, else
    after ATTEMPTS without a new byte), is no such JSON, or does not fit on the disk; what has come
    is kept.
    """
    part = _Part(target, url)
    most, failures = part.usable(), 0
    while True:
        try:
            if not part.whole():
                _transfer(http, part, brackets, show)
            return _finish(part, brackets)
        except _Passing as problem:
            if part.size() > most:
                most, failures = part.size(), 0
            failures += 1
            if failures == ATTEMPTS:
                raise InputError(
                    f"{url}: cannot be had ({problem}; {ATTEMPTS} tries); {OTHER_WAYS}"
                ) from None
            pause = max(FIRST_PAUSE_SECONDS * 2 ** (failures - 1), problem.pause)
            pause = min(pause, LONGEST_PAUSE_SECONDS)
            place = f"going on at byte {part.usable():,}" if part.usable() else "again"
            say(f"{url}: {problem}; {place} in {pause:.0f} s")
            sleep(pause)
        except OSError as error:
            raise disk_problem(part.path, error) from None


class _Part:
    """What has come of a file, and of what it is a part."""

    def __init__(self, target: Path, url: str) -> None:
        self.url = url
        self.path = target.with_name(f"{target.name}.part")
        self.note = note_of(target)
        # Of what it is a part; without a mark nothing can be built upon it.
        self.mark: str | None = None
        self.total: int | None = None
        try:
            told = json.loads(self.note.read_text(encoding="utf-8"))
            if told["url"] == url:
                self.mark, self.total = told["mark"], told["size"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing is known of it, so it starts again

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def usable(self) -> int:
        """How many bytes the next try can go on from."""
        return self.size() if self.mark else 0

    def whole(self) -> bool:
        return self.total is not None and self.usable() == self.total

    def drop(self) -> None:
        self.mark = self.total = None
        self.path.unlink(missing_ok=True)

    def begin(self, response: httpx.Response) -> None:
        """Start again with what the server has now. Emptied first: the note is never ahead."""
        self.path.write_bytes(b"")
        self.mark = _mark(response)
        length = response.headers.get("Content-Length", "")
        self.total = int(length) if length.isdecimal() else None
        write_json(self.note, {"url": self.url, "mark": self.mark, "size": self.total})


def note_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.from")


def _transfer(http: httpx.Client, part: _Part, brackets: str, show: Show) -> None:
    """One request; InputError or _Passing says why the part is not whole after it."""
    start = part.usable()
    headers = {"Range": f"bytes={start}-", "If-Range": str(part.mark)} if start else {}
    try:
        with http.stream("GET", part.url, headers=headers) as response:
            _check_status(response, part)
            chunks = response.iter_raw(CHUNK_BYTES)
            if response.status_code == httpx.codes.PARTIAL_CONTENT:
                _check_range(response, part, start)
            else:
                chunks = _opened(chunks, brackets, part.url)
                part.begin(response)
            _check_space(part)
            with part.path.open("ab") as file:
                for chunk in chunks:
                    file.write(chunk)
                    show(file.tell(), part.total)
    except LASTING as error:
        raise InputError(f"{part.url}: {error}; {OTHER_WAYS}") from None
    except httpx.RequestError as error:
        raise _Passing(f"{type(error).__name__}: {error}".removesuffix(": ")) from None


def _check_status(response: httpx.Response, part: _Part) -> None:
    code = response.status_code
    if code in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
        return
    said = f"HTTP {code} {response.reason_phrase}".strip()
    if code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
        part.drop()
        raise _Passing(f"{said}: it has become shorter")
    if code >= 500 or code in PASSING:
        asked = response.headers.get("Retry-After", "")
        raise _Passing(said, float(asked) if asked.isdecimal() else 0.0)
    raise InputError(f"{part.url}: {said}; is the address right? {OTHER_WAYS}")


def _check_range(response: httpx.Response, part: _Part, start: int) -> None:
    """What follows must be the rest of what the part is of; no server should send another."""
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if (
        not told
        or int(told[1]) != start
        or part.total not in (None, int(told[2]))
        or _mark(response) not in (None, part.mark)
    ):
        part.drop()
        raise _Passing("the server sent another range than the one asked for")
    part.total = int(told[2])


def _check_space(part: _Part) -> None:
    free = shutil.disk_usage(part.path.parent).free
    if part.total is not None and free < part.total - part.size():
        raise InputError(
            f"{part.path.parent}: no space for {part.url}: {part.total - part.size():,} bytes are "
            f"to come, {free:,} are free; free some, or set lamp.cache to a folder on another disk"
        )


def _opened(chunks: Iterator[bytes], brackets: str, url: str) -> Iterator[bytes]:
    """The same chunks; InputError, before anything is written, when they open another thing."""
    first = next(chunks, b"")
    check_start(first[:END_BYTES], brackets, url)
    return chain([first], chunks)


def _finish(part: _Part, brackets: str) -> Fetched:
    """Check the part's size and ends, and hash it."""
    size = part.size()
    if part.total is not None and size != part.total:
        if size > part.total:
            part.drop()
        raise _Passing(f"ended at byte {size:,} of {part.total:,}")
    if part.total is None and not ends(part.path, brackets):
        raise _Passing(f"broke off at byte {size:,}, before the closing {brackets[1]}")
    hashed = hashlib.sha256()
    with part.path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            # JSON has none; a part that was being written when the power failed may.
            if b"\0" in chunk:
                part.drop()
                raise _Passing("it holds zero bytes, as a file does after a loss of power")
            hashed.update(chunk)
    try:
        check_json(part.path, brackets, part.url)
    except InputError:
        part.drop()
        raise
    fsync(part.path)
    return Fetched(part.path, hashed.hexdigest(), size, part.mark)


def _mark(response: httpx.Response) -> str | None:
    """What `If-Range` can name the content by; a weak ETag is not allowed there."""
    tag: str | None = response.headers.get("ETag")
    if tag and not tag.startswith("W/"):
        return tag
    return response.headers.get("Last-Modified")

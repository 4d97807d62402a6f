"""LaMP's own files from the benchmark's site or a mirror, kept in a cache (docs/your-data.md).

    folder = official_files("LaMP-3", LampOptions(), say=print, progress=lambda *_: None)

The result is a folder that tasks/lamp/formats.py reads. The cache has the folders of the site, so
a copy of the cache can serve as a mirror:

    <cache>[/time]/LaMP_3/manifest.json       sha256 of each file, where it came from
    <cache>[/time]/LaMP_3/dev/dev_questions.json, dev_outputs.json
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pooch
import requests
from filelock import FileLock, Timeout

from tasks.errors import InputError
from tasks.files import file_sha256, fsync, write_atomic
from tasks.lamp.options import LampOptions
from tasks.lamp.records import short

# Source: the links of https://lamp-benchmark.github.io/download. LaMP_2 is the first LaMP-2, news
# categories; movie tags came later. LaMP-6 is not here: the site has only ids of its e-mails.
FOLDERS = {
    "LaMP-1": "LaMP_1",
    "LaMP-2M": "LaMP_2/new",
    "LaMP-2N": "LaMP_2",
    "LaMP-3": "LaMP_3",
    "LaMP-4": "LaMP_4",
    "LaMP-5": "LaMP_5",
    "LaMP-7": "LaMP_7",
}
# The first and last character of each file.
KINDS = {"questions": "[]", "outputs": "{}"}
MANIFEST = "manifest.json"
OTHER_WAYS = "try data=<folder with the files>, lamp.url=<mirror>, or a proxy by HTTP_PROXY"

CHUNK_BYTES = 256 * 1024
TIMEOUT_SECONDS = 30.0
RETRIES = 6  # after pauses of 1, 2, ... seconds
PASSING = (408, 425, 429)  # client errors that a later try may not meet

Say = Callable[[str], None]
# Name of the file, bytes there are, bytes there will be (None where the server does not say).
ShowFile = Callable[[str, int, int | None], None]

pooch.get_logger().setLevel(logging.ERROR)  # its own lines would go to stderr


def official_files(lamp_task: str, options: LampOptions, say: Say, progress: ShowFile) -> Path:
    """Return the folder with `options.part` of a LaMP task; download what the cache lacks.

    say: takes one line at a time for a log. progress: called for each chunk that arrives.
    Files in the cache are used without asking the site. Their sha256 must be the recorded one;
    files put there by hand are recorded at the first use. One process downloads at a time.
    Raises InputError for what cannot be downloaded, written or trusted.
    """
    if lamp_task not in FOLDERS:
        raise InputError(
            f"data=lamp: the benchmark has no files of {lamp_task} to download (LaMP-6 is made of "
            "a licensed corpus); use data=<folder>"
        )
    inside = site_folder(lamp_task, options)
    place = cache_folder(options) / inside
    folder = place / options.part
    url = f"{options.url.rstrip('/')}/{inside}/{options.part}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A shared cache may be read-only: then there is nothing to lock and nothing is recorded.
        writable = os.access(place, os.W_OK) and os.access(folder, os.W_OK)
        with _alone(place, say) if writable else contextlib.nullcontext():
            for kind, brackets in KINDS.items():
                file = folder / f"{options.part}_{kind}.json"
                if missing := not file.exists():
                    _download(f"{url}/{file.name}", _Resuming(file, brackets, say, progress))
                _check_recorded(file, brackets, url if missing else None, writable, say)
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: {error.strerror or error}; free space there, or set "
            "lamp.cache to a folder that can be written to (what has come is kept)"
        ) from None
    return folder


def site_folder(lamp_task: str, options: LampOptions) -> str:
    """The folder of a LaMP task below the site's address, and below the cache."""
    name = FOLDERS[lamp_task]
    return f"time/{name}" if options.split == "time" else name


def cache_folder(options: LampOptions) -> Path:
    """Return `lamp.cache`; by default `mta/lamp` in the user's cache folder (XDG_CACHE_HOME)."""
    return Path(options.cache or pooch.os_cache("mta") / "lamp").expanduser().absolute()


def _alone(place: Path, say: Say) -> contextlib.AbstractContextManager[object]:
    """The lock of a LaMP task's folder, held; it is released when its holder ends."""
    lock = FileLock(place / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say(f"{place}: another process is at work there; waiting for it")
        return lock.acquire()


class _Refused(Exception):
    """A failure that no later try will change."""


@dataclass(frozen=True)
class _Resuming:
    """A downloader for pooch that continues a broken transfer, in this run or a later one.

    `<file>.part` holds what has come. `<file>.part-of` names the address and the version there (its
    ETag, or its date). A part is continued only while both are the same (`If-Range`, RFC 9110,
    section 13.1.5), so two versions are never mixed.
    """

    file: Path
    brackets: str
    say: Say
    show: ShowFile

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        Path(output_file).unlink()  # else a killed run would leave it, empty
        part = self.file.with_name(f"{self.file.name}.part")
        note = part.with_name(f"{part.name}-of")
        address, _, version = note.read_text().partition("\n") if note.exists() else ("", "", "")
        start = part.stat().st_size if part.exists() and version and address == url else 0
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": version}
        self.say(f"downloading {url} to {self.file}" + (f", from byte {start:,}" if start else ""))
        try:
            with requests.get(
                url,
                headers=headers,
                stream=True,
                timeout=TIMEOUT_SECONDS,
                verify=os.environ.get("SSL_CERT_FILE") or True,
            ) as response:
                if not _continues(response, start, version):
                    part.unlink()
                    raise requests.ConnectionError("the server cannot continue what has come")
                _check_answer(response)
                if response.status_code != requests.codes.partial_content:
                    start = 0
                    part.write_bytes(b"")  # emptied before the note says what it is a part of
                    note.write_text(f"{url}\n{_version(response)}")
                length = response.headers.get("Content-Length", "")
                total = start + int(length) if length.isdecimal() else None
                with part.open("ab") as opened:
                    for chunk in response.iter_content(CHUNK_BYTES):
                        opened.write(chunk)
                        self.show(self.file.name, opened.tell(), total)
        except requests.RequestException as error:
            self.say(f"{url}: {_why(error)}")
            raise
        if problem := _problem(part, self.brackets):
            part.unlink()
            raise _Refused(problem)
        fsync(part)
        part.replace(output_file)
        note.unlink()


def _continues(response: requests.Response, start: int, version: str) -> bool:
    """False where what was to be the rest of that version, from byte `start`, is something else."""
    if response.status_code == requests.codes.partial_content:
        sent = response.headers.get("Content-Range", "")
        return sent.startswith(f"bytes {start}-") and _version(response) in ("", version)
    return response.status_code != requests.codes.range_not_satisfiable


def _check_answer(response: requests.Response) -> None:
    """Raise _Refused, or requests' own error, for an answer without the file."""
    if 400 <= response.status_code < 500 and response.status_code not in PASSING:
        raise _Refused(f"HTTP {response.status_code} {response.reason}; is the address right?")
    response.raise_for_status()
    # The benchmark's site sends a page with status 200 for some addresses that do not exist.
    if "html" in response.headers.get("Content-Type", ""):
        raise _Refused("holds a web page instead of JSON, so its address was wrong")


def _version(response: requests.Response) -> str:
    """What `If-Range` can name the content by; a weak ETag is not allowed there."""
    tag = response.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified", "")


def _download(url: str, downloader: _Resuming) -> None:
    base, _, name = url.rpartition("/")
    folder, registry = downloader.file.parent, {name: None}
    site = pooch.create(folder, base, registry=registry, retry_if_failed=RETRIES)
    try:
        site.fetch(name, downloader=downloader)
    except (_Refused, requests.RequestException) as error:
        raise InputError(f"{url}: {_why(error)}; {OTHER_WAYS}") from None


def _why(error: Exception) -> str:
    """An error in short: requests wraps the reason into several others."""
    if isinstance(error, _Refused):
        return str(error)
    return f"{type(error).__name__}: {getattr(error.args[0], 'reason', error)}"


def _problem(file: Path, brackets: str) -> str:
    """What both ends of a file show to be wrong with it; empty if nothing is."""
    with file.open("rb") as opened:
        start = opened.read(512).removeprefix(b"\xef\xbb\xbf").lstrip()
        opened.seek(max(0, file.stat().st_size - 512))
        end = opened.read().rstrip()
    if start[:1] == b"<":
        return "holds a web page instead of JSON, so its address was wrong"
    if start[:1] != brackets[0].encode():
        shown = short(start[:20].decode(errors="replace")) if start else "nothing"
        return f"starts with {shown}, not {brackets[0]}; plain JSON is needed"
    return "" if end[-1:] == brackets[1].encode() else f"is cut off: it ends without {brackets[1]}"


def _check_recorded(file: Path, brackets: str, url: str | None, writable: bool, say: Say) -> None:
    """Compare a file with its record, or record it. url: the folder it was just downloaded from."""
    # Beside the folder, not in it: all JSON in there is data.
    manifest = file.parent.parent / MANIFEST
    name = f"{file.parent.name}/{file.name}"
    sha256 = file_sha256(file)
    try:
        entries = dict(json.loads(manifest.read_text("utf-8"))) if manifest.exists() else {}
        recorded = entries[name]["sha256"] if name in entries and url is None else None
    except (ValueError, TypeError, KeyError):
        raise InputError(
            f"{manifest}: is damaged; delete it, and the files beside it are taken as they are"
        ) from None
    if recorded == sha256:
        return
    if recorded:
        raise InputError(
            f"{file}: changed since it was recorded (sha256 {sha256[:12]}, was {recorded[:12]}); "
            f"delete it to download it again, or delete {manifest} to take it as it is"
        )
    if problem := _problem(file, brackets):
        raise InputError(f"{file}: {problem}; {OTHER_WAYS}")
    say(f"{file}: {'downloaded' if url else 'found in the cache'}, sha256 {sha256}")
    if writable:
        about = {"sha256": sha256, "url": url and f"{url}/{file.name}"}
        write_atomic(manifest, json.dumps(entries | {name: about}, indent=1).encode())

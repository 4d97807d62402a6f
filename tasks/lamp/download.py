"""LaMP's own files from the benchmark's site or a mirror, kept in a cache (docs/your-data.md).

The cache has the folders of the site, so a copy of the cache can serve as a mirror:

    <cache>[/time]/LaMP_3/manifest.json       sha256 of each file, where it came from
    <cache>[/time]/LaMP_3/dev/dev_questions.json, dev_outputs.json
"""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pooch
import requests
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_incrementing

from tasks.errors import InputError
from tasks.files import file_sha256, fsync, locked, write_atomic
from tasks.lamp.options import LampOptions
from tasks.lamp.records import quoted

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
WEB_PAGE = "holds a web page instead of JSON, so its address was wrong"

Say = Callable[[str], None]
# Name of the file, bytes there are, bytes there will be (None where the server does not say).
ShowFile = Callable[[str, int, int | None], None]


def official_files(lamp_task: str, options: LampOptions, say: Say, progress: ShowFile) -> Path:
    """Return the folder with `options.part` of a LaMP task; download what the cache lacks.

    say: takes a line for a log. progress: called for each chunk that arrives. What is in the cache
    must have the sha256 that is recorded; files put there by hand are recorded at the first use.
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A shared cache may be read-only: then there is nothing to lock and nothing is recorded.
        writable = os.access(place, os.W_OK) and os.access(folder, os.W_OK)
        waiting = partial(say, f"{place}: another process is at work there; waiting for it")
        with locked(place / ".lock", waiting) if writable else contextlib.nullcontext():
            for kind, brackets in KINDS.items():
                file = folder / f"{options.part}_{kind}.json"
                url = None
                if not file.exists():
                    url = f"{options.url.rstrip('/')}/{inside}/{options.part}/{file.name}"
                    _download(url, file, brackets, say, progress)
                _check_recorded(file, brackets, url, writable, say)
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


def _download(url: str, file: Path, brackets: str, say: Say, show: ShowFile) -> None:
    """Make `file` of what the address has; failures that may pass are tried again.

    `<file>.part` holds what has come. `<file>.part-of` names the address and the version there (its
    ETag, or its date).
    """
    part, note = (file.with_name(f"{file.name}.{end}") for end in ("part", "part-of"))
    tries = Retrying(
        retry=retry_if_exception_type(requests.RequestException),
        before_sleep=lambda tried: say(
            f"{url}: {_why(tried.outcome.exception() if tried.outcome else None)}"
        ),
        wait=wait_incrementing(1, 1),
        stop=stop_after_attempt(1 + RETRIES),
        reraise=True,
    )
    try:
        tries(_fetch, url, part, note, say, lambda *now: show(file.name, *now))
    except requests.RequestException as error:
        raise InputError(f"{url}: {_why(error)}; {OTHER_WAYS}") from None
    if problem := _problem(part, brackets):
        part.unlink()
        raise InputError(f"{url}: {problem}; {OTHER_WAYS}")
    fsync(part)
    part.replace(file)
    note.unlink()


def _fetch(
    url: str, part: Path, note: Path, say: Say, show: Callable[[int, int | None], None]
) -> None:
    """Bring `part` to its end. What an earlier try or run has got of the same version stays.

    The site is asked by `If-Range` (RFC 9110, section 13.1.5), so versions are never mixed.
    """
    address, _, version = note.read_text().partition("\n") if note.exists() else ("", "", "")
    start = part.stat().st_size if part.exists() and version and address == url else 0
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    say(f"downloading {url} to {part}" + (f", from byte {start:,}" if start else ""))
    verify = os.environ.get("SSL_CERT_FILE") or True
    with requests.get(
        url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS, verify=verify
    ) as response:
        status, sent = response.status_code, response.headers
        rest = sent.get("Content-Range", "").startswith(f"bytes {start}-")
        continued = status == requests.codes.partial_content
        if status == requests.codes.range_not_satisfiable or (
            continued and not (rest and _version(sent) in ("", version))
        ):
            part.unlink()
            raise requests.ConnectionError("the server cannot continue what has come")
        if 400 <= status < 500 and status not in PASSING:
            why = f"HTTP {status} {response.reason}; is the address right?"
            raise InputError(f"{url}: {why}; {OTHER_WAYS}")
        response.raise_for_status()
        # The benchmark's site sends a page with status 200 for some addresses that do not exist.
        if "html" in sent.get("Content-Type", ""):
            raise InputError(f"{url}: {WEB_PAGE}; {OTHER_WAYS}")
        if not continued:
            start = 0
            part.write_bytes(b"")  # emptied before the note says what it is a part of
            note.write_text(f"{url}\n{_version(sent)}")
        length = sent.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else None
        with part.open("ab") as opened:
            for chunk in response.iter_content(CHUNK_BYTES):
                opened.write(chunk)
                show(opened.tell(), total)


def _version(headers: Mapping[str, str]) -> str:
    """What `If-Range` can name the content by; a weak ETag is not allowed there."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def _why(error: BaseException | None) -> str:
    """An error in short: requests wraps the reason into several others."""
    said = error and getattr(error.args[0], "reason", error)
    return f"{type(error).__name__}: {said}"


def _problem(file: Path, brackets: str) -> str:
    """What both ends of a file show to be wrong with it; empty if nothing is."""
    with file.open("rb") as opened:
        start = opened.read(512).removeprefix(b"\xef\xbb\xbf").lstrip().decode(errors="replace")
        opened.seek(max(0, file.stat().st_size - 512))
        end = opened.read().rstrip()
    if start.startswith("<"):
        return WEB_PAGE
    if not start.startswith(brackets[0]):
        shown = quoted(start[:20]) if start else "nothing"
        return f"starts with {shown}, not {brackets[0]}; plain JSON is needed"
    return (
        "" if end.endswith(brackets[1].encode()) else f"is cut off: it ends without {brackets[1]}"
    )


def _check_recorded(file: Path, brackets: str, url: str | None, writable: bool, say: Say) -> None:
    """Compare a file with its record, or record it. url: where it was just downloaded from."""
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
        entries |= {name: {"sha256": sha256, "url": url}}
        write_atomic(manifest, json.dumps(entries, indent=1).encode())

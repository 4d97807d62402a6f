"""The benchmark's files by LaMP task: their addresses, the cache, and what is known of its files.

The cache has the folders of the site, so that a copy of the one serves as the other:

    <cache>[/time]/LaMP_3/manifest.json       of each file: sha256, size, time, where it came from
    <cache>[/time]/LaMP_3/dev/dev_questions.json, dev_outputs.json
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tasks.errors import InputError
from tasks.lamp.download.files import check_json, disk_problem, write_json
from tasks.lamp.download.transfer import Say, client, fetch, note_of
from tasks.options import LampOptions
from tasks.store.files import file_sha256, fsync

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
# What the JSON of each file opens and closes with.
KINDS = {"questions": "[]", "outputs": "{}"}
MANIFEST = "manifest.json"

# A file's name, bytes there are, bytes there will be (None where the server does not say).
ShowFile = Callable[[str, int, int | None], None]


def official_files(lamp_task: str, options: LampOptions, say: Say, progress: ShowFile) -> Path:
    """The folder with `options.part` of a LaMP task: what is not in the cache is downloaded.

    say: takes one line at a time for a log. progress: called for each piece that comes.
    Files that lie there already are taken, without asking the site: those downloaded must be what
    they were (sha256, looked at when size or time differ), those put there by hand are recorded.
    Several processes may ask for the same: one downloads, the others wait.
    Raises InputError, in one line, for what cannot be had, written or believed.
    """
    if lamp_task not in FOLDERS:
        raise InputError(
            f"data=lamp: the benchmark has no files of {lamp_task} to download (LaMP-6 is made of "
            "a licensed corpus); use data=<folder>"
        )
    inside = f"time/{FOLDERS[lamp_task]}" if options.split == "time" else FOLDERS[lamp_task]
    place = cache_folder(options) / inside
    part = place / options.part
    try:
        part.mkdir(parents=True, exist_ok=True)
        # An administrator's copy may be read-only: nothing to lock there, nothing to write.
        writable = os.access(place, os.W_OK) and os.access(part, os.W_OK)
        with _alone(place, say) if writable else contextlib.nullcontext():
            for kind, brackets in KINDS.items():
                file = part / f"{options.part}_{kind}.json"
                if file.exists():
                    _check_known(file, brackets, say)
                    continue
                url = f"{options.url.rstrip('/')}/{inside}/{options.part}/{file.name}"
                _download(url, file, brackets, say, progress)
    except OSError as error:
        raise disk_problem(Path(error.filename or part), error) from None
    return part


def cache_folder(options: LampOptions) -> Path:
    """`lamp.cache`, or `mta/lamp` where the user's caches are (XDG base directories)."""
    try:
        if options.cache is not None:
            return Path(options.cache).expanduser().absolute()
        caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # The specification has relative paths ignored.
        return (caches if caches.is_absolute() else Path.home() / ".cache") / "mta" / "lamp"
    except RuntimeError:
        raise InputError("there is no home folder for the cache: set lamp.cache") from None


@contextlib.contextmanager
def _alone(place: Path, say: Say) -> Iterator[None]:
    """Hold the task's folder; the lock falls with the process that holds it."""
    lock = FileLock(place / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{place}: another process is at work there; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _download(url: str, file: Path, brackets: str, say: Say, progress: ShowFile) -> None:
    say(f"downloading {url} to {file}")
    with client() as http:
        got = fetch(
            http, url, file, brackets, say, lambda done, total: progress(file.name, done, total)
        )
    # Recorded first: killed in between, the next call finds the part whole and places it.
    _record(file, got.part, {"sha256": got.sha256, "url": url, "mark": got.mark})
    got.part.replace(file)
    fsync(file.parent)
    note_of(file).unlink(missing_ok=True)
    say(f"{file}: {got.size:,} bytes, sha256 {got.sha256}")


def _check_known(file: Path, brackets: str, say: Say) -> None:
    """A file that lies there is the one that was recorded, or is recorded now."""
    manifest = _manifest(file)
    known = _read(manifest).get(_name(file))
    writable = os.access(manifest.parent, os.W_OK)
    if known is None:
        check_json(file, brackets, str(file))
        found = file_sha256(file)
        say(f"{file}: found, not downloaded by this project; sha256 {found}")
        if writable:
            _record(file, file, {"sha256": found, "url": None, "mark": None})
        return
    stat = file.stat()
    if (stat.st_size, stat.st_mtime_ns) == (known["bytes"], known["mtime_ns"]):
        return
    found = file_sha256(file)
    if found != known["sha256"]:
        raise InputError(
            f"{file}: changed since it was recorded (sha256 {found[:12]}, was "
            f"{known['sha256'][:12]}); delete it to download it again, or delete {manifest} to "
            "take it as it is"
        )
    if writable:
        _record(file, file, known)


def _manifest(file: Path) -> Path:
    # Not beside the files: all JSON there is data.
    return file.parent.parent / MANIFEST


def _name(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def _record(file: Path, content: Path, about: dict[str, Any]) -> None:
    """Note in the manifest what `file` is; its content may still lie elsewhere."""
    stat = content.stat()
    entry = {
        "sha256": about["sha256"],
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "url": about["url"],
        "mark": about["mark"],
        "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    manifest = _manifest(file)
    write_json(manifest, {**_read(manifest), _name(file): entry})


def _read(manifest: Path) -> dict[str, Any]:
    if not manifest.exists():
        return {}
    try:
        known = json.loads(manifest.read_text(encoding="utf-8"))
        for entry in known.values():
            if not {"sha256", "bytes", "mtime_ns", "url", "mark"} <= entry.keys():
                raise ValueError
    except (ValueError, AttributeError):
        raise InputError(
            f"{manifest}: not as it was written; delete it, and the files beside it are taken as "
            "they are"
        ) from None
    return known

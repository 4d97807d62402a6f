"""What a run logs to MLflow, kept on the disk until MLflow took it: in order, once.

    <store>/../spool/<run>/about.json, 000001.json, 000002.json and files ...

An entry, or several that belong together, is written first and then given to MLflow, at once where
it answers, and removed when it was taken. What was not taken, because MLflow was down or the run
was killed, is given later: by the next entry, at the end of the run, at the start of the next run,
or by `python -m tasks.tracking`. Files that the store keeps are named, not copied. One process at a
time holds a run's folder.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.errors import StorageError, masked
from tasks.running.faults import disk_full, transient
from tasks.stage import log
from tasks.store.artifacts import Store
from tasks.store.files import write_atomic
from tasks.store.pieces import Ref
from tasks.tracking.replay import Replay, RunGone, target

FOLDER, ABOUT = "spool", "about.json"
# Seconds between tries while MLflow is down, doubled from the first to the last.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
# And at the end of a run, when there is nothing else to do.
LAST_TRIES = (1.0, 2.0, 4.0, 8.0)


def _warn(line: str) -> None:
    log(line, warning=True)


class Spool:
    """The entries of one run. Raises BlockingIOError where another process has it open."""

    def __init__(
        self,
        folder: Path,
        replay: Replay,
        about: dict[str, Any] | None = None,
        tell: Callable[[str], None] = _warn,
    ) -> None:
        self.folder, self.replay, self.tell = folder, replay, tell
        self.why: str | None = None  # MLflow did not take the last one it was given
        self.refused: list[str] = []
        self.logged = 0  # of the files of entries, those that MLflow took whole
        self._earlier = about is None  # the run is an earlier one's, maybe begun at another MLflow
        self.elsewhere = False  # it was, so it waits for that one
        self._not_begun: set[str] = set()  # keys of runs whose start was refused here
        self._again = 0.0  # when to try next, and how long after that
        self._pause = FIRST_PAUSE
        self._own: set[str] = set()
        self._together: list[dict[str, Any]] | None = None
        self._taken = 0  # of the entries in the first file that waits
        self._answered = False
        self._one = threading.RLock()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / ".lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if about is not None:
            self._write(ABOUT, about | {"target": target(replay.uri)})
        self.about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        self._next = 1 + max((int(path.stem) for path in self.waiting()), default=0)

    def waiting(self) -> list[Path]:
        """The entries that MLflow has not taken, in order."""
        return sorted(path for path in self.folder.glob("*.json") if path.stem.isdigit())

    def add(self, kind: str, key: str, **fields: Any) -> None:
        """Keep an entry, and give MLflow what waits. Raises OSError where the disk does not."""
        with self._one:
            entry = {"kind": kind, "key": key, **fields}
            if self._together is None:
                self._keep([entry])
            else:
                self._together.append(entry)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is added inside is kept as one file: to bring each onto the disk takes its time."""
        with self._one:
            entries: list[dict[str, Any]] = []
            self._together = entries
            try:
                yield
            finally:
                self._together = None
            self._keep(entries)

    def add_text(self, key: str, text: str, path: str) -> None:
        """Keep a text as an artifact `path`."""
        with self._one:
            # A file of its own with its own suffix: `forget.holding` searches it as what it is.
            name = f"{self._next:06d}-{Path(path).name}"
            write_atomic(self.folder / name, text.encode("utf-8", "surrogatepass"))
            self.add("file", key, file=name, path=path)

    def add_piece(self, key: str, ref: Ref, inside: str, to: str | None = None) -> None:
        """Name a file, or a folder, of a piece of the store as an artifact below `to`."""
        self.add("piece", key, ref=dict(ref), inside=inside, to=to)

    def add_values(
        self,
        key: str,
        params: dict[str, str] | None = None,
        metrics: Sequence[tuple[str, float, int]] = (),
    ) -> None:
        """Keep parameters, and metrics (name, value, step), which MLflow gets in one call."""
        now = int(time.time() * 1000)
        # As a text where JSON has no number for it.
        points = [[n, v if math.isfinite(v) else str(v), now, step] for n, v, step in metrics]
        self.add("values", key, params=params or {}, metrics=points)

    def send(self) -> bool:
        """Give MLflow what waits, in order; whether nothing waits any more.

        What MLflow answers with a refusal is removed and told in `refused`: nothing would help it.
        """
        with self._one:
            for path in self.waiting():
                refused = len(self.refused)
                entries = json.loads(path.read_text(encoding="utf-8"))
                for entry in entries[self._taken :]:
                    if not self._give(entry, path.name in self._own):
                        return False
                    self._taken += 1
                path.unlink()
                self._taken = 0
                self.logged += len(self.refused) == refused
                for entry in entries:
                    if entry["kind"] == "file":
                        (self.folder / entry["file"]).unlink(missing_ok=True)
            return True

    def _give(self, entry: dict[str, Any], anew: bool) -> bool:
        """Whether MLflow has answered, be it with a refusal. anew: as `Replay.take` has it."""
        try:
            self.replay.take(entry, self.folder, anew)
        except Exception as error:
            # An OSError is this machine's; a server may say the same of its own disk.
            if isinstance(error, OSError) and disk_full(error):
                raise
            gone = isinstance(error, RunGone) and error.key not in self._not_begun
            if gone and self._earlier:
                # Two MLflows may have had this address, and the other one took the run's start.
                self.why = f"{error}; log to the MLflow that has it, or remove {self.folder}"
                self.elsewhere, self._answered = True, False  # `finish` need not be patient
                return False
            if _waits(error) or disk_full(error):
                self._behind(error)
                return False
            self._refuse(entry, error)
        self._answered = True
        self.why, self._again, self._pause = None, 0.0, FIRST_PAUSE
        return True

    def finish(self) -> bool:
        """Give MLflow what waits, patiently if it has answered before; whether all went."""
        for pause in LAST_TRIES:
            if self.send():
                return True
            if not self._answered:
                return False
            time.sleep(pause)
        return self.send()

    def close(self) -> None:
        """Let others have the folder; it is removed where nothing waits."""
        with self._one:
            if not self.waiting():
                shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()

    def behind(self) -> str | None:
        """What a person has to know and do where MLflow is behind, in one line."""
        count = len(self.waiting())
        if not count:
            return None
        return masked(
            f"MLflow at {self.replay.uri} is behind ({self.why}): {count} entries wait in "
            f"{self.folder} and are logged by the next run, or by `python -m tasks.tracking`"
        )

    def outcome(self) -> str:
        """How many of an earlier run's entries were logged, wait and why, and were refused."""
        left = len(self.waiting())
        why = f" ({self.why})" if left else ""
        refused = f", {len(self.refused)} refused" if self.refused else ""
        return masked(f"run {self.about['name']}: {self.logged} logged, {left} wait{why}{refused}")

    def _keep(self, entries: list[dict[str, Any]]) -> None:
        name = f"{self._next:06d}.json"
        self._next += 1
        self._own.add(name)
        self._write(name, entries)
        if time.monotonic() >= self._again:
            self.send()

    def _behind(self, error: Exception) -> None:
        first = self.why is None
        why = " ".join(str(error).split())[:200]
        self.why = f"{type(error).__name__}: {why}"
        if isinstance(error, StorageError):
            self._answered = False  # storage was asked with patience: `finish` need not be patient
        self._again = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if first:
            self.tell(f"MLflow does not take what is logged, it is kept ({self.why})")

    def _refuse(self, entry: dict[str, Any], error: Exception) -> None:
        why = masked(" ".join(str(error).split()))[:200]
        line = f"MLflow refused an entry of kind {entry['kind']} ({type(error).__name__}: {why})"
        self.refused.append(line)
        if entry["kind"] == "run":
            self._not_begun.add(entry["key"])
        self.tell(line)

    def _write(self, name: str, value: Any) -> None:
        text = json.dumps(value, ensure_ascii=False)
        write_atomic(self.folder / name, text.encode("utf-8", "surrogatepass"))


def _waits(error: Exception) -> bool:
    """Whether the entry is to wait: no answer of MLflow or the store, or nobody is let in."""
    if isinstance(error, StorageError):
        return True
    status = getattr(error, "get_http_status_code", None)
    return transient(error) or (status is not None and int(status()) in (401, 403))


def others(where: Store, replay: Replay, tell: Callable[[str], None] = _warn) -> Iterator[Spool]:
    """What earlier runs left for this MLflow; those that a process has open are left to it."""
    for folder in sorted((where.root.parent / FOLDER).glob("*")):
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            if about["target"] == target(replay.uri):
                yield Spool(folder, replay, tell=tell)
        except (OSError, ValueError, KeyError):
            continue  # open elsewhere, or begun and not finished


def catch_up(where: Store, replay: Replay) -> None:
    """Log what earlier runs left, at the start of a run; what does not pass waits on."""
    for spool in others(where, replay):
        count = len(spool.waiting())
        goes_on = spool.send() or spool.elsewhere
        if count:
            log(f"MLflow: {spool.outcome()}")
        spool.close()
        if not goes_on:
            return


def waiting(state: Path) -> dict[str, int]:
    """Name of each run of which something waits -> how many entries."""
    found = {}
    for folder in sorted((state / FOLDER).glob("*")):
        count = sum(path.stem.isdigit() for path in folder.glob("*.json"))
        if count:
            found[folder.name] = count
    return found


def clear(state: Path) -> None:
    """Remove what is left of spools of which nothing waits and that no process has open."""
    for folder in (state / FOLDER).glob("*"):
        if folder.name in waiting(state) or not folder.is_dir():
            continue
        with (folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(folder, ignore_errors=True)


def replay_all(where: Store, uris: list[str], say: Callable[[str], None]) -> int:
    """Log what waits to whichever of `uris` it is for; the number of entries that still wait."""
    for uri in uris:
        for spool in others(where, Replay(uri, where), tell=lambda _line: None):
            spool.finish()
            say(spool.outcome())
            for line in spool.refused:
                say(f"run {spool.about['name']}: {line}")
            spool.close()
    return sum(waiting(where.root.parent).values())

"""Who makes what just now: two runs that want the same work share it.

Before a piece is made its key is claimed, and with it the keys of the rows it will hold. Who wants
any of them meanwhile, a thread, a process or another machine, waits for the end and then finds what
was made. A claim is one small file:

    <store>/.claims/<stage>/<host>~<pid>~<start>~<random>      {"names": [...], "beat": 3}

A claim is written first, and holds only if no other in force names the same; else it is taken back
and tried again a moment later. That needs nothing of the storage but that a file which was written
is listed from then on, which shared folders and S3 promise. A claim names all that its holder wants
at once, and what is made for one (tokens) waits for nothing else, so nobody waits in a circle.

A holder that was killed frees its claims: on its own machine as soon as its process is gone, or the
machine was started again; for others, who cannot know, when the claim was not renewed for
STALE_SECONDS by the waiter's own clock. A holder that stands still for longer than that (a
suspended machine) may find its work done twice, the same piece both times; nothing worse.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tasks.store import processes

BEAT_SECONDS = 15.0
STALE_SECONDS = 120.0
# So many times longer for a claim of this machine whose process lives.
OWN_MACHINE = 10
# Of a key: enough to tell any two apart, and claims of ten thousand users stay small.
NAME_LENGTH = 16


class Board(Protocol):
    """Where claims hang: a flat folder per stage, on a disk or in a remote store."""

    # Seconds between two looks at a claim that is waited for.
    poll: float
    # Where the claims are, for a person who is to remove one.
    place: str

    def stages(self) -> list[str]: ...
    def names(self, stage: str) -> list[str]: ...
    def read(self, stage: str, name: str) -> bytes | None: ...
    def write(self, stage: str, name: str, text: bytes) -> None: ...
    def remove(self, stage: str, name: str) -> None: ...


class FolderBoard:
    """Claims in a folder of this machine, or one that several machines mount."""

    poll = 0.1

    def __init__(self, root: Path) -> None:
        self.root = root
        self.place = str(root)

    def stages(self) -> list[str]:
        return self.names("")

    def names(self, stage: str) -> list[str]:
        try:
            return sorted(os.listdir(self.root / stage))
        except FileNotFoundError:
            return []

    def read(self, stage: str, name: str) -> bytes | None:
        try:
            return (self.root / stage / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, stage: str, name: str, text: bytes) -> None:
        place = self.root / stage
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(text)

    def remove(self, stage: str, name: str) -> None:
        (self.root / stage / name).unlink(missing_ok=True)


class Claims:
    """The claims of one store. `say` is told whom this process waits for."""

    def __init__(self, board: Board, say: Callable[[str], None]) -> None:
        self.board = board
        self.say = say

    @contextmanager
    def held(self, stage: str, keys: Iterable[str]) -> Iterator[None]:
        """Hold the claim of `keys`; waits for whoever holds any of them. No keys: no claim."""
        names = sorted({key[:NAME_LENGTH] for key in keys})
        if not names:
            yield
            return
        own = self._take(stage, names)
        done = threading.Event()
        beats = threading.Thread(
            target=self._renew, args=(stage, own, names, done), name="mta-claim", daemon=True
        )
        beats.start()
        try:
            yield
        finally:
            done.set()
            beats.join()
            # The work is done and kept; a claim that stays is stale in a while.
            with contextlib.suppress(Exception):
                self.board.remove(stage, own)

    def in_force(self) -> list[str]:
        """Where each claim is, less those of this machine's dead processes."""
        return [
            f"{self.board.place}/{stage}/{name}"
            for stage in self.board.stages()
            for name in self.board.names(stage)
            if not self._gone(stage, name)
        ]

    def _take(self, stage: str, names: list[str]) -> str:
        own = f"{processes.host()}~{processes.me()}~{uuid.uuid4().hex}"
        seen: dict[str, tuple[bytes, float, float]] = {}
        told = False
        pause = self.board.poll
        while True:
            holder = self._holder(stage, names, own, seen)
            if holder is None:
                try:
                    self.board.write(stage, own, _text(names, 0))
                    # Of two who wrote at once at least one sees the other here.
                    if self._holder(stage, names, own, seen) is None:
                        return own
                except BaseException:
                    with contextlib.suppress(Exception):
                        self.board.remove(stage, own)
                    raise
                self.board.remove(stage, own)
                pause = min(2 * pause, 20 * self.board.poll)
            elif not told:
                host, pid, *_ = holder.split("~")
                self.say(f"store: {stage}: process {pid} on {host} is making this; waiting for it")
                told = True
            time.sleep(random.uniform(0.2, 1.0) * pause)

    def _holder(
        self,
        stage: str,
        names: list[str],
        own: str,
        seen: dict[str, tuple[bytes, float, float]],
    ) -> str | None:
        """Another claim in force that names any of `names`, or None.

        seen: per claim its text, for how long it has been that, and when it was looked at.
        """
        for name in self.board.names(stage):
            if name == own or self._gone(stage, name):
                continue
            text = self.board.read(stage, name)
            if text is None or not _shares(text, names):
                continue
            now = time.monotonic()
            before, still, looked = seen.get(name, (b"", 0.0, now))
            # A look that storage kept waiting says nothing of the time before it: then the holder's
            # beats may have been kept as well.
            still = still + min(now - looked, BEAT_SECONDS) if text == before else 0.0
            seen[name] = (text, still, now)
            # On this machine its process lives: only a claim that could not be removed is so old.
            here = name.split("~")[0] == processes.host()
            if still >= STALE_SECONDS * (OWN_MACHINE if here else 1):
                self.board.remove(stage, name)
                continue
            return name
        return None

    def _gone(self, stage: str, name: str) -> bool:
        """Whether a claim was of a process of this machine that is gone; it is then removed."""
        if not processes.ended(name):
            return False
        self.board.remove(stage, name)
        return True

    def _renew(self, stage: str, own: str, names: list[str], done: threading.Event) -> None:
        beat = 0
        while not done.wait(BEAT_SECONDS):
            beat += 1
            # Storage that does not answer now may the next time; the work goes on either way.
            with contextlib.suppress(Exception):
                self.board.write(stage, own, _text(names, beat))


def _text(names: list[str], beat: int) -> bytes:
    return json.dumps({"names": names, "beat": beat}).encode()


def _shares(text: bytes, names: list[str]) -> bool:
    """Whether a claim names any of `names`; one that cannot be read (half written) may."""
    try:
        told: dict[str, Any] = json.loads(text)
        return not set(names).isdisjoint(told["names"])
    except (ValueError, KeyError, TypeError):
        return True

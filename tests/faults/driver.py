"""Runs from an empty store to the end, with faults at seeded moments, each held against an
undisturbed run."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.local.settings import StackError
from tests.faults.kinds import KINDS, Draw, Kind
from tests.faults.pieces import Given, Ledger, whole
from tests.faults.ways import (
    Alone,
    Ended,
    FaultError,
    OnStack,
    Way,
    copy_project,
    environment,
    wait,
)
from tests.small import SMALL

# As for the flow tests, but in more jobs and in processes: eight anchors, some of which share one.
SECTIONS: dict[str, Any] = SMALL | {
    "synthetic": SMALL["synthetic"] | {"few_shot_users": 6},
    "anchors": SMALL["anchors"] | {"count": 8, "per_job": 3},
    "stacking": SMALL["stacking"] | {"users_per_job": 2},
    # Trainings of a second or less: so that some are killed after a checkpoint.
    "compute": {"checkpoint_seconds": 0.05, "workers": "processes"},
}
FAULTS_A_RUN = 3
# A run starts again at most so often after its last fault.
ATTEMPTS = 5
# The least of an undisturbed run that one takes which finds everything: it imports as much.
LEAST_SHARE = 0.25
# A user would have given up on a run that neither moves nor ends.
STUCK_SECONDS = 600.0
# What else the project keeps than the store: databases, and what was deployed there.
STATE = ("local", "mlflow", "prefect", "deployed.json")


@dataclass
class Outcome:
    """What is printed at the end, as JSON."""

    seed: int
    kills: int = 0
    lost: int = 0
    twice: int = 0
    differing: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    runs: int = 0
    pieces: int = 0
    attempts: int = 0
    seconds: float = 0.0

    def good(self) -> bool:
        return not (self.lost or self.twice or self.differing)


class Driver:
    """The faults of one seed. Everything it keeps is in `folder`."""

    def __init__(
        self, folder: Path, kills: int, seed: int, kinds: Sequence[str], workers: int
    ) -> None:
        self.kills, self.seed = kills, seed
        self.layout = copy_project(folder / "project")
        self.began = time.monotonic()
        self.outcome = Outcome(seed)
        self.decks: dict[Way, Iterator[tuple[str, Draw]]] = {}
        work = {"max_workers": workers} if workers else {"workers": "threads", "max_workers": 1}
        sections = SECTIONS | {"compute": SECTIONS["compute"] | work}
        for way in (kind(self.layout, environment(), sections) for kind in (Alone, OnStack)):
            own = [name for name in kinds if way.name in KINDS[name].ways]
            if own:
                self.decks[way] = _deck(own, random.Random(f"{seed} {way.name}"))
        self.next = {way: next(deck) for way, deck in self.decks.items()}

    def run(self) -> None:
        """All of it. Raises FaultError when a run does not come to an end."""
        try:
            self._undisturbed()
            while self.outcome.kills < self.kills:
                self._one(list(self.decks)[self.outcome.runs % len(self.decks)])
                self.outcome.runs += 1
        finally:
            self.outcome.seconds = round(time.monotonic() - self.began, 1)
            for way in self.decks:
                way.stop()

    def _undisturbed(self) -> None:
        """The run that all others are held against; how long it takes decides the moments."""
        way = next(iter(self.decks))
        way.begin()
        self._started(way)
        began = time.monotonic()
        ended = wait(way, STUCK_SECONDS)
        given = Given.last(self.layout.state)
        if ended is None or not ended.completed or given is None:
            raise FaultError(f"the undisturbed run failed: {ended and ended.message}")
        self.run_seconds = time.monotonic() - began
        self.outcome.pieces = len(whole(self.layout.store))
        kept = self.layout.root / "undisturbed"
        self.layout.store.rename(kept)
        self.undisturbed = Given(given.run, kept)
        self._say(f"an undisturbed run: {self.outcome.pieces} pieces in {self.run_seconds:.0f} s")

    def _one(self, way: Way) -> None:
        """One run: its faults, its end, and what is left of it."""
        shutil.rmtree(self.layout.store, ignore_errors=True)
        self.layout.store.mkdir()
        self.ledger = Ledger(self.layout.store)
        self._begin(way)
        for _ in range(min(FAULTS_A_RUN, self.kills - self.outcome.kills)):
            name, draw = self.next[way]
            if not self._fault(way, name, draw):
                break  # the run was through before: it is for the next one
            self.next[way] = next(self.decks[way])
        given = self._finish(way)
        for what, names in (
            ("lost", self.ledger.lost()),
            ("twice", self.ledger.twice),
            ("differing", self.undisturbed.differing(given)),
        ):
            setattr(self.outcome, what, getattr(self.outcome, what) + len(names))
            if names:
                self._say(f"{what}: {', '.join(sorted(names))}")

    def _fault(self, way: Way, name: str, draw: Draw) -> bool:
        """Wait for the moment and strike; False when the run was complete before."""
        kind = KINDS[name]
        if kind.fresh:
            self._forget(way)
        while (said := self._struck(way, kind, draw)) is None:
            ended = wait(way, 1.0)
            if ended and ended.completed:
                return False
            if ended:
                self._say(f"       {ended.message[:200]}")
                self._begin(way)
        self.outcome.kills += 1
        self.outcome.kinds[name] = self.outcome.kinds.get(name, 0) + 1
        self._say(
            f"{self.outcome.kills:3}/{self.kills} run {self.outcome.runs} ({way.name}): {name}, "
            f"{said}; {len(self.ledger.seen)} of {self.outcome.pieces} pieces"
        )
        if name in ("worker", "server", "mlflow"):
            way.mend()
        return True

    def _struck(self, way: Way, kind: Kind, draw: Draw) -> str | None:
        """What was struck at the moment that the seed decides; None where it did not come."""
        if not kind.fresh and self._started(way):
            return None
        if kind.after:
            before: set[Path] = set() if kind.fresh else self._files(kind)
            new: set[Path] = set()
            while len(new) < kind.count(draw):
                if way.outcome():
                    return None
                new |= self._files(kind) - before
                time.sleep(0.02)  # the look itself takes a core's time
        else:
            share = 1 - len(whole(self.layout.store)) / self.outcome.pieces
            if wait(way, draw.fraction * self.run_seconds * max(share, LEAST_SHARE)):
                return None
        self.ledger.look()
        return kind.strike(way, draw, self.ledger)

    def _files(self, kind: Kind) -> set[Path]:
        return set(self.layout.state.glob(kind.after))

    def _finish(self, way: Way) -> Given:
        """To the end, as often as it takes: a user starts a run again that failed, or whose
        results were damaged."""
        for _ in range(ATTEMPTS):
            ended = wait(way, STUCK_SECONDS)
            if ended is None:
                raise FaultError("a run did not come to its end")
            self.ledger.look()
            given = Given.last(self.layout.state)
            if ended.completed and given and given.intact():
                return given
            said = ended.message
            self._say(f"       {said[:200]}")
            self._begin(way)
        raise FaultError(f"not finished after {ATTEMPTS} attempts: {said}")

    def _begin(self, way: Way) -> None:
        self.outcome.attempts += 1
        self.ledger.look()
        way.begin()

    def _started(self, way: Way) -> Ended | None:
        """Wait for the run to begin its work; how it ended where it has ended."""
        limit = time.monotonic() + STUCK_SECONDS
        while (ended := way.outcome()) is None and not way.started():
            if time.monotonic() > limit:
                raise FaultError(f"a run was not started in {STUCK_SECONDS:.0f} s")
            time.sleep(0.1)
        return ended

    def _forget(self, way: Way) -> None:
        """Have a run begin on nothing but the store."""
        way.stop()
        for path in (self.layout.state / name for name in STATE):
            path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, True)
        with suppress(FaultError, StackError):
            self._begin(way)

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.0f} s  {text}", flush=True)


def _deck(kinds: Sequence[str], dice: random.Random) -> Iterator[tuple[str, Draw]]:
    """Kinds without end, each as often as the others, in an order that the seed decides."""
    while True:
        for kind in dice.sample(kinds, len(kinds)):
            yield kind, Draw(dice.random(), dice.random(), dice.random())

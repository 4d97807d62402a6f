"""Runs from an empty store to the end, with faults at seeded moments, each held against an
undisturbed run."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import early
from tests.faults.kinds import ALONE, ON_RAY, ON_STACK, Draw, Strike, disk_freed
from tests.faults.pieces import Ledger, Pieces, Shown, whole
from tests.faults.ways import (
    Alone,
    Ended,
    FaultError,
    OnRay,
    OnStack,
    Way,
    copy_project,
    environment,
    mount_store,
)
from tests.ray_nodes import installed
from tests.small import SMALL

KINDS = {
    "stack": ON_STACK | {"early": early.on_stack},
    "alone": ALONE | {"early": early.alone},
    "ray": ON_RAY,
}
# As for the flow tests, but in more jobs: eight anchors, two or three of which share one.
SECTIONS: dict[str, Any] = SMALL | {
    "synthetic": SMALL["synthetic"] | {"few_shot_users": 6},
    "anchors": SMALL["anchors"] | {"count": 8, "per_job": 3},
    "stacking": SMALL["stacking"] | {"users_per_job": 2},
    # Trainings of a second or less: so that some are killed after a checkpoint.
    "compute": {"checkpoint_seconds": 0.05},
}
# In turn. A Ray cluster takes as long to start as the rest takes to run.
TURNS = ("stack", "alone", "stack", "stack", "stack", "alone", "stack", "ray")
FAULTS_A_RUN = (2, 4)
# A run starts again at most so often after its last fault.
ATTEMPTS = 5
# The least of an undisturbed run that one takes which finds everything: it imports as much.
LEAST_SHARE = 0.25
# A user would have given up on a run that neither moves nor ends.
STUCK_SECONDS = 240.0


@dataclass
class Outcome:
    """What is printed at the end, as JSON."""

    kills: int = 0
    lost: int = 0
    twice: int = 0
    differing: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    pieces: int = 0
    attempts: int = 0
    seed: int = 0
    disk: str = ""
    seconds: float = 0.0

    def good(self) -> bool:
        return not (self.lost or self.twice or self.differing)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"kinds": dict(sorted(self.kinds.items()))}


class Driver:
    """The faults of one seed. Everything it keeps is in `folder`."""

    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self.kills, self.seed = kills, seed
        self.layout = copy_project(folder / "project")
        self.journal = folder / "journal.jsonl"
        self.began = time.monotonic()
        mounted = mount_store(self.layout)
        self.outcome = Outcome(seed=seed, disk="tmpfs" if mounted else "RLIMIT_FSIZE")
        env = environment(self.journal)
        self.ways: dict[str, Way] = {
            way.name: way(self.layout, env, SECTIONS)
            for way in ((OnStack, Alone, OnRay) if installed() else (OnStack, Alone))
        }
        self.decks = {
            name: _deck(list(KINDS[name]), random.Random(f"{seed} {name}")) for name in self.ways
        }
        self.next = {way: next(deck) for way, deck in self.decks.items()}
        self.undisturbed: Pieces = {}
        self.run_seconds = 0.0

    def run(self) -> Outcome:
        """All of it. Raises FaultError when a run does not come to an end."""
        try:
            self._reference()
            while self.outcome.kills < self.kills:
                self._one(self.outcome.runs)
                self.outcome.runs += 1
        finally:
            self.outcome.seconds = round(time.monotonic() - self.began, 1)
            for way in self.ways.values():
                way.stop()
        return self.outcome

    def _reference(self) -> None:
        """The run that all others are held against; how long it takes decides the moments."""
        self._say("an undisturbed run")
        stack = self.ways["stack"]
        stack.begin()
        self._started(stack)
        began = time.monotonic()
        ended = self._end(stack)
        if not ended.completed:
            raise FaultError(f"the undisturbed run failed: {ended.message}")
        self.run_seconds = time.monotonic() - began
        self.undisturbed = whole(self.layout.store)
        self.shown = Shown.read(self.layout.state)
        self.outcome.pieces = len(self.undisturbed)
        self._say(f"{len(self.undisturbed)} pieces in {self.run_seconds:.0f} s")

    def _one(self, number: int) -> None:
        """One run: its faults, its end, and what is left of it."""
        turns = [name for name in TURNS if name in self.ways]
        way = self.ways[turns[number % len(turns)]]
        table = KINDS[way.name]
        self._empty()
        ledger = Ledger(self.undisturbed, self.journal)
        self._begin(way)
        dice = random.Random(f"{self.seed} run {number}")
        planned = min(dice.randint(*FAULTS_A_RUN), self.kills - self.outcome.kills)
        for _ in range(planned):
            kind, draw = self.next[way.name]
            if not self._fault(number, way, kind, table[kind], draw, ledger):
                break  # the run was through before: this fault is for the next one
            self.next[way.name] = next(self.decks[way.name])
        self._finish(way, ledger)
        self._judge(ledger)
        if isinstance(way, OnRay):
            way.rest()

    def _fault(
        self, number: int, way: Way, kind: str, strike: Strike, draw: Draw, ledger: Ledger
    ) -> bool:
        """Wait for the moment and strike; False when the run was complete before."""
        while True:
            share = 1 - len(whole(self.layout.store)) / len(self.undisturbed)
            expected = self.run_seconds * max(share, LEAST_SHARE)
            seconds = draw.fraction * expected
            ended = self._started(way)
            began = time.monotonic()
            ended = ended or way.wait(seconds)
            if ended is None:
                pieces = whole(self.layout.store)
                ledger.strike(pieces)
                said = strike(way, draw, ledger)
                if said is not None:
                    break
                ended = way.wait(1.0)
            if ended is not None:
                if ended.completed:
                    # The machine has become quicker since: else this moment might never come.
                    took = (time.monotonic() - began) / expected
                    self.run_seconds *= min(1.0, max(0.5, took))
                    return False
                self._say(f"       {ended.message[:200]}")
                self._begin(way)
        self.outcome.kills += 1
        self.outcome.kinds[kind] += 1
        self._say(
            f"{self.outcome.kills:3}/{self.kills} run {number} ({way.name}): {kind}, {said}; "
            f"{seconds:.1f} s after its start, {len(pieces)} of {len(self.undisturbed)} pieces"
        )
        if kind == "disk_full":
            self._say(f"       {self._end(way).message[:200]}")
            disk_freed(way)
        elif kind == "early":
            self._begin(way)
        elif kind in ("worker", "server", "mlflow", "ray_node"):
            way.mend()
        return True

    def _finish(self, way: Way, ledger: Ledger) -> None:
        """To the end, as often as it takes: a user starts a run again that failed, or whose
        results were damaged."""
        for _ in range(ATTEMPTS):
            ended = self._end(way)
            missing = ledger.unfinished(whole(self.layout.store))
            if ended.completed and not missing:
                return
            self._say(f"       {ended.message[:200]}; {len(missing)} pieces to make")
            self._begin(way)
        raise FaultError(f"not finished after {ATTEMPTS} attempts: {ended.message}")

    def _judge(self, ledger: Ledger) -> None:
        pieces, shown = whole(self.layout.store), Shown.read(self.layout.state)
        other = [f"{uri} in the run" for uri, _ in shown.results ^ self.shown.results]
        other += [" ".join(row) for row in set(shown.table) ^ set(self.shown.table)]
        for what, names in (
            ("lost", ledger.lost(pieces)),
            ("twice", ledger.twice()),
            ("differing", ledger.differing(pieces) + other),
        ):
            setattr(self.outcome, what, getattr(self.outcome, what) + len(names))
            if names:
                self._say(f"{what}: {', '.join(names)}")

    def _begin(self, way: Way) -> None:
        self.outcome.attempts += 1
        way.begin()

    def _started(self, way: Way) -> Ended | None:
        """Wait for the run's process; how it ended where it had none any more."""
        limit = time.monotonic() + STUCK_SECONDS
        while (ended := way.outcome()) is None and not way.started():
            if time.monotonic() > limit:
                raise FaultError(f"a run was not started in {STUCK_SECONDS:.0f} s")
            time.sleep(0.1)
        return ended

    def _end(self, way: Way) -> Ended:
        ended = way.wait(STUCK_SECONDS + 5 * self.run_seconds)
        if ended is None:
            raise FaultError("a run did not come to its end")
        return ended

    def _empty(self) -> None:
        """A store as new; the folder itself may be a mount."""
        for path in self.layout.store.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.journal.unlink(missing_ok=True)

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.0f} s  {text}", flush=True)


def _deck(kinds: list[str], dice: random.Random) -> Iterator[tuple[str, Draw]]:
    """Kinds without end, each as often as the others, in an order that the seed decides."""
    while True:
        for kind in dice.sample(kinds, len(kinds)):
            yield kind, Draw(dice.random(), dice.random(), dice.random())

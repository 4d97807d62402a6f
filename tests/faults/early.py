"""The fault `early`: kills in the first three seconds of a database, everything but the store new.

The seconds are counted from when the file has some tables, wherever it is being made: until then
its maker imports.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

from infra.local.settings import StackError
from tasks.store.files import PARTIAL
from tests.faults.kinds import Draw, killed
from tests.faults.pieces import Ledger
from tests.faults.ways import FaultError, Way

EARLY_SECONDS = 3.0
# A tenth of what a whole database takes.
SOME_TABLES = 100_000
# What else the project keeps: databases, what is logged to them, what was deployed there.
STATE = ("local", "mlflow", "prefect", "spool", "deployed.json")
PREFECT, MLFLOW = "prefect.db", "mlflow.db"


def on_stack(way: Way, draw: Draw, _ledger: Ledger) -> str | None:
    """Both servers at their first start; and again, so that what the first kill left is met."""
    _forget_all(way)
    said = [
        _kill_early(way, {PREFECT: ("server", one), MLFLOW: ("mlflow", other)})
        for one, other in ((draw.target, draw.detail), (draw.detail, draw.target))
    ]
    return ", ".join(said)


def alone(way: Way, draw: Draw, _ledger: Ledger) -> str | None:
    """The run while Prefect's database is made, and the next two at MLflow's: from a fifth of its
    steps it could go on."""
    _forget_all(way)
    moments = ((PREFECT, draw.target), (MLFLOW, draw.detail), (MLFLOW, (draw.detail + 0.5) % 1))
    return ", ".join(_kill_early(way, {name: ("job", moment)}) for name, moment in moments)


def _forget_all(way: Way) -> None:
    way.stop()
    for name in STATE:
        path = way.layout.state / name
        path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def _kill_early(way: Way, targets: dict[str, tuple[str, float]]) -> str:
    """Start a run; kill, for each file, the process, at a fraction of the early seconds."""
    before = _stamps(way)
    starting = Thread(target=_begin, args=(way,))
    starting.start()
    began: dict[str, float] = {}
    said = []
    left = dict(targets)
    while left:
        served = way.name == "stack" and not starting.is_alive()
        new = {path.name.removesuffix("-wal") for path, _ in _stamps(way) - before}
        for name, (what, fraction) in list(left.items()):
            over = not starting.is_alive() and way.process(what) is None
            if name not in began and (served or name in new):
                began[name] = time.monotonic()
            seconds = fraction * EARLY_SECONDS
            due = name in began and time.monotonic() > began[name] + seconds
            if due and killed(way.process(what)):
                said.append(f"{what} {seconds:.1f} s after {name}")
            elif not over:
                continue
            del left[name]
        time.sleep(0.02)
    starting.join()
    return ", ".join(said) or "nothing"


def _stamps(way: Way) -> set[tuple[Path, int]]:
    """The files of databases and when each was last written; but of those that are being made only
    that they have tables: what made them for a run that was killed goes on for a moment."""
    found = set()
    for folder, _, names in os.walk(way.layout.state):
        for path in (Path(folder, name) for name in names if name.endswith((".db", ".db-wal"))):
            with suppress(FileNotFoundError):
                made, stat = PARTIAL in path.parent.name, path.stat()
                if stat.st_size >= SOME_TABLES:
                    found.add((path, 0 if made else stat.st_mtime_ns))
    return found


def _begin(way: Way) -> None:
    with suppress(FaultError, StackError):
        way.begin()

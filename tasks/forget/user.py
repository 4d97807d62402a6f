"""Remove a user, and all that was made of the user's texts, and prove it by a search.

`tasks/forget/__main__.py` says what goes and what stays.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from tasks.errors import InputError, label
from tasks.forget.holding import Marks, holds, strings
from tasks.forget.pieces import (
    Known,
    checkpoints_to_remove,
    known_of,
    pieces,
    reason_to_remove,
)
from tasks.forget.records import (
    Records,
    forget_in_mlflow,
    forget_in_prefect,
    left_in_mlflow,
)
from tasks.forget.sources import in_sources
from tasks.report.files import REPORT_FILE, REPORTS_FOLDER, RUNS_FOLDER, TABLE_FILE
from tasks.store import checkpoints
from tasks.store.artifacts import Store
from tasks.store.claims import STALE_SECONDS
from tasks.tracking import spool
from tasks.tracking.replay import mlflow_uris

# They say who was trained on whom, so they go last, in this order: a call that was cut off is made
# again, and must know it again.
LAST = ("bank", "anchors", "task_adapt", "base_model", "prepare", "synthetic")


def forget(where: Store, user_id: str, data: Path | None = None) -> tuple[list[str], list[str]]:
    """Forget a user; (what was done, what is left), in lines.

    Raises InputError where nothing knows the user, or a run is under way.
    """
    where.sweep()
    checkpoints.sweep(where)
    if working := where.working():
        raise InputError(
            f"store: {working[0]} is being made by a run; let it end, or where its machine is gone "
            f"(a claim does not change for {STALE_SECONDS:g} s then) remove that, and call again"
        )
    where.fetch_all()
    state = where.root.parent
    spool.clear(state)
    if late := spool.waiting(state):
        raise InputError(
            f"{state / spool.FOLDER}: {sum(late.values())} entries wait to be logged to MLflow and "
            "may name the user; `python -m tasks.tracking`, or remove that folder, and call again"
        )
    tracked = mlflow_uris(state)
    runs = _run_files(state)
    sources, texts = in_sources(where, [run for _, run in runs], user_id, data)
    known = known_of(where, user_id, texts)
    plan = [
        (stage, folder, reason)
        for stage, folder, record in pieces(where)
        if (reason := reason_to_remove(stage, folder, record, known))
    ]
    cut_off = checkpoints_to_remove(where, known)
    marks = known.marks()
    uris = {f"{stage}/{folder.name}" for stage, folder, _ in plan}
    certain = [
        reason
        for reason in (*(reason for _, _, reason in plan), *cut_off.values())
        if reason in ("holds the user", "trained on the user")
    ]
    touched = {file: run for file, run in runs if certain and _names(run, uris, marks)}
    mlflow = Records()
    for uri in tracked:
        mlflow += forget_in_mlflow(uri, marks, known.anchors, uris if certain else set())
    if not (certain or mlflow.done or sources):
        if known.unsaid:
            raise InputError(f"{label(user_id)}: no such user is named, but {known.unsaid[0]}")
        raise InputError(f"{label(user_id)}: no such user in {where.root}, MLflow or known data")
    done = [f"{name}: {count} removed" for name, count in mlflow.done.items()]
    flow_runs = {file.stem for file in touched} | mlflow.flow_runs
    # Beside the store; `flows.local` makes it where it is called.
    homes = dict.fromkeys(home.absolute() for home in (state / "local", Path(".mta/local")))
    said, left = forget_in_prefect(flow_runs, list(homes))
    done += said
    if certain or mlflow.done:
        done += _forget_beside(state, touched, marks)
        for file in cut_off:
            file.unlink()
        done += _remove(where, plan)
        for reason, count in Counter(cut_off.values()).items():
            done.append(f"checkpoints removed ({reason}): {count}")
    done += _told(known)
    searched, found = search(where, marks)
    left += mlflow.left + found + known.unsaid
    left += [line for uri in tracked for line in left_in_mlflow(uri, marks)]
    left = list(dict.fromkeys(left))
    done.append(
        f"proof: searched {searched} files of the store and beside it, and MLflow: "
        + (f"{len(left)} left" if left else "nothing of the user is left")
    )
    done += [f"{source}: still holds the user, who comes back with it" for source in sources]
    return done, left


def _remove(where: Store, plan: list[tuple[str, Path, str]]) -> list[str]:
    counts: Counter[str] = Counter()
    for stage, folder, reason in sorted(plan, key=lambda item: _turn(item[0])):
        where.remove(stage, folder.name)
        counts[f"store: {stage}: pieces removed ({reason})"] += 1
    return [f"{what}: {count}" for what, count in counts.items()]


def _turn(stage: str) -> int:
    return LAST.index(stage) + 1 if stage in LAST else 0


def _told(known: Known) -> list[str]:
    lines = []
    if known.base_trained:
        lines.append("trained on the user: the base model; all that it was for is made again")
    if known.anchors:
        names = ", ".join(sorted(map(label, known.anchors)))
        lines.append(f"trained on the user: anchors {names}; they are removed, and trained again")
    return lines


def _run_files(state: Path) -> list[tuple[Path, dict[str, Any]]]:
    found = []
    for file in sorted((state / RUNS_FOLDER).glob("*.json")):
        try:
            found.append((file, json.loads(file.read_text(encoding="utf-8"))))
        except ValueError:
            found.append((file, {}))
    return found


def _names(run: dict[str, Any], uris: set[str], marks: Marks) -> bool:
    found = list(strings(run))
    return not run or marks.in_values(found) or any(text in uris for text, _ in found)


def _forget_beside(state: Path, runs: dict[Path, dict[str, Any]], marks: Marks) -> list[str]:
    """Runs and what they showed removed; in logs, which servers go on writing, the id is crossed
    out."""
    names = {(run.get("about") or {}).get("report") for run in runs.values()}
    shown = (state / REPORTS_FOLDER).glob("*")
    gone = [*runs, *(file for file in shown if file.stem in names or holds(file, marks))]
    for file in gone:
        file.unlink()
    removed = len(gone)
    for newest in (state / REPORT_FILE, state / TABLE_FILE):
        # Links, to nothing by now; files, where an earlier version wrote them.
        if os.path.lexists(newest) and not (newest.is_symlink() and newest.exists()):
            newest.unlink()
            removed += 1
    crossed = sum(_cross_out(file, marks) for file in sorted((state / "logs").glob("*.log")))
    return [f"beside the store: {removed} files removed, {crossed} names crossed out in logs"]


def _cross_out(file: Path, marks: Marks) -> int:
    """Ids in a log become x's of the same length, in place: it may be open for appending."""
    text = file.read_bytes().decode("utf-8", "surrogateescape")
    places = [match.span() for match in marks.words.finditer(text)]
    with file.open("r+b") as opened:
        for start, end in places:
            opened.seek(len(text[:start].encode("utf-8", "surrogateescape")))
            opened.write(b"x" * len(text[start:end].encode("utf-8", "surrogateescape")))
    return len(places)


def search(where: Store, marks: Marks) -> tuple[int, list[str]]:
    """How many files were searched, and those that hold a mark or cannot be read."""
    where.fetch_all()
    state = where.root.parent
    beside = [state / REPORT_FILE, state / TABLE_FILE, *checkpoints.folder(where).rglob("*"),
              *(state / RUNS_FOLDER).glob("*.json"), *(state / REPORTS_FOLDER).glob("*"),
              *(state / "logs").glob("*.log")]  # fmt: skip
    files = sorted(file for file in (*where.root.rglob("*"), *beside) if file.is_file())
    left = []
    for file in files:
        try:
            found = "holds the user" if holds(file, marks) else None
        except Exception as error:
            found = f"cannot be searched ({type(error).__name__})"
        if found:
            left.append(f"{file}: {found}")
    return len(files), left

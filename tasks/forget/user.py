"""Remove a user, and all that was made of the user's texts, and prove it by a search.

`mta forget --help` says what goes and what stays.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.errors import InputError, label
from tasks.forget.closure import MODELS, folders_in, has_mark, marks_of, stage_of, what_goes
from tasks.forget.holding import Marks, strings
from tasks.forget.mlflow_records import traces_in_mlflow
from tasks.forget.prefect_records import forget_in_prefect
from tasks.forget.sources import in_sources
from tasks.meta_lora import META
from tasks.report.files import REPORT_FILE, REPORTS_FOLDER, RUNS_FOLDER, TABLE_FILE
from tasks.results.rows import INDEX
from tasks.results.store import CHECKPOINTS, Store
from tasks.tracking.server import mlflow_uris


def forget(store: Store, user_id: str, data: Path | None = None) -> tuple[list[str], list[str]]:
    """Forget a user; (what was done, what is left), in lines.

    Raises InputError where nothing knows the user, or a run is under way.
    """
    store.sweep()
    if working := store.working():
        raise InputError(f"store: {working[0]} is held by a run; let it end, and call again")
    store.fetch_all()
    uris = mlflow_uris(store.state)
    runs = {file: _json(file) for file in _beside(store, f"{RUNS_FOLDER}/*.json")}
    sources, texts = in_sources(runs.values(), user_id, data)
    marks = marks_of(store, user_id, texts)
    gone, files = what_goes(store, marks)
    base = any(stage_of(uri) in MODELS for uri in gone)
    anchors = {_anchor(store, uri) for uri in gone if stage_of(uri) == "meta_lora"
               and (base or has_mark(store.root / uri, marks))}  # fmt: skip
    trained = base or bool(anchors)
    in_store = bool(gone or files)
    named = [file for file, values in runs.items() if in_store and _names(values, gone, marks)]
    flow_runs = {file.stem for file in named}
    taught = flow_runs if trained else set()
    in_mlflow, left = traces_in_mlflow(uris, marks, anchors | marks.ids, taught, remove=True)
    if not (in_store or in_mlflow or sources):
        raise InputError(f"{label(user_id)}: no such user in {store.root}, MLflow or known data")
    flow_runs |= {trace.flow_run for trace in in_mlflow if trace.flow_run}
    # Beside the store; `mta run` makes it where it is called.
    homes = dict.fromkeys(home.absolute() for home in (store.state / "local", Path(".mta/local")))
    done, unknown = forget_in_prefect(flow_runs, homes)
    left += unknown
    if in_mlflow:
        done.append(f"MLflow: removed from {len(in_mlflow)} runs")
    if in_store or in_mlflow:
        done.append(_forget_beside(store, {file: runs[file] for file in named}, marks))
        done += _remove(store, gone, files)
    if trained:
        names = ["the base model"] * base + [f"anchor {label(one)}" for one in sorted(anchors)]
        done.append(f"trained on the user, so removed and trained again: {', '.join(names)}")
    searched, found = search(store, marks)
    again, failed = traces_in_mlflow(uris, marks)
    left += [*found, *failed, *(line for trace in again for line in trace.lines())]
    left = list(dict.fromkeys(left))
    done.append(
        f"proof: searched {searched} files of the store and beside it, and MLflow: "
        + (f"{len(left)} left" if left else "nothing of the user is left")
    )
    done += [f"{source}: still holds the user, who comes back with it" for source in sources]
    return done, left


def search(store: Store, marks: Marks) -> tuple[int, list[str]]:
    """How many files were searched, and those that hold a mark or cannot be read."""
    store.fetch_all()
    beside = (REPORT_FILE, TABLE_FILE, f"{CHECKPOINTS}/*/*", f"{RUNS_FOLDER}/*",
              f"{REPORTS_FOLDER}/*", "logs/*.log")  # fmt: skip
    files = [*sorted(store.root.rglob("*")), *_beside(store, *beside)]
    files = [file for file in files if file.is_file()]
    return len(files), [
        f"{file}: holds the user, or cannot be read" for file in files if has_mark(file, marks)
    ]


def _beside(store: Store, *patterns: str) -> list[Path]:
    """Files beside the store."""
    return sorted(file for pattern in patterns for file in store.state.glob(pattern))


def _json(file: Path) -> Any:
    """What a file holds; None where it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _names(values: Any, gone: set[str], marks: Marks) -> bool:
    """Whether a run names the user or what goes, or cannot be read."""
    return values is None or marks.in_values(strings(values)) or bool(folders_in(values) & gone)


def _anchor(store: Store, uri: str) -> str:
    """The anchor of a meta-LoRA; its uri where that cannot be read."""
    values = _json(store.root / uri / META)
    return str(values["anchor"]) if values else uri


def _remove(store: Store, gone: set[str], files: Iterable[Path]) -> list[str]:
    """Tables of users go last: a call that was cut off is made again, and looks the user up there.

    By then what lost its result is what no result points to. Trainings that were cut off may be of
    the user, or go on from what goes: all begin anew.
    """
    cut_off = [file for file in store.checkpoints.rglob("*") if file.is_file()]
    for file in (*cut_off, *files):
        if file.is_relative_to(store.root):
            store.remove(file)
        else:
            file.unlink()
    for uri in sorted(gone, key=lambda uri: (stage_of(uri) == "prepare", uri)):
        store.remove(store.root / uri)
    (store.root / INDEX).unlink(missing_ok=True)  # made again from what is there
    counts = sorted(Counter(map(stage_of, gone)).items())
    lines = [f"store: {stage}: {count} folders removed" for stage, count in counts]
    return lines + ([f"checkpoints removed: {len(cut_off)}"] if cut_off else [])


def _forget_beside(store: Store, runs: dict[Path, Any], marks: Marks) -> str:
    """Runs and what they showed are removed; in logs, which servers go on writing, the id is
    crossed out."""
    names = {values["report"] for values in runs.values() if values and "report" in values}
    reports = _beside(store, f"{REPORTS_FOLDER}/*")
    removed = [*runs, *(file for file in reports if file.stem in names or has_mark(file, marks))]
    # Links to the newest, of which nothing may be left.
    newest = [store.state / REPORT_FILE, store.state / TABLE_FILE]
    for file in removed:
        file.unlink()
    for link in newest:
        if link.is_symlink() and not link.exists():
            link.unlink()
    crossed = sum(_cross_out(file, marks) for file in _beside(store, "logs/*.log"))
    return f"beside the store: {len(removed)} files removed, {crossed} names crossed out in logs"


def _cross_out(file: Path, marks: Marks) -> int:
    """Ids in a log become x's of the same length, in place: it may be open for appending."""
    text = file.read_bytes().decode("utf-8", "surrogateescape")
    crossed, count = marks.words.subn(lambda found: "x" * len(_bytes(found.group())), text)
    with file.open("r+b") as opened:
        opened.write(_bytes(crossed))
    return count


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")

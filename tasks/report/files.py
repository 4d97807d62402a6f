"""What runs leave beside the store, in `.mta`: a file for each run, its table and its report."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from tasks.errors import InputError
from tasks.stage import store
from tasks.store.artifacts import Store
from tasks.store.files import write_atomic

# One small file per flow run: what it consists of.
RUNS_FOLDER = "runs"
# Tables and reports of all runs, by the run's name.
REPORTS_FOLDER = "reports"
# Where the newest of each is found: links.
TABLE_FILE = "last_comparison.txt"
REPORT_FILE = "report.html"
LONGEST_NAME = 80


def write_state(name: str, text: str) -> Path:
    """Write a small file beside the store (`.mta/<name>`), whole or not at all."""
    path = store().root.parent / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode("utf-8"))
    return path


def report_name(run: str, run_id: str) -> str:
    """A file name for what the run of that name shows; with its id where an earlier run has it."""
    name = re.sub(r"[^\w.-]+", "-", run).strip("-.")[:LONGEST_NAME] or "run"
    known = any((store().root.parent / REPORTS_FOLDER).glob(f"{name}.*"))
    return f"{name}-{run_id[:8]}" if known else name


def write_report(name: str, link: str, text: str) -> Path:
    """Write what a run shows, and make it the newest; returns the file of the run.

    name: of `report_name`. link: TABLE_FILE or REPORT_FILE, whose ending the file gets.
    """
    path = write_state(f"{REPORTS_FOLDER}/{name}{Path(link).suffix}", text)
    newest = path.parent.parent / link
    new = newest.with_name(f".{link}-{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(path.relative_to(newest.parent))
    new.replace(newest)
    return path


def write_run(
    name: str,
    config: dict[str, Any],
    summaries: list[dict[str, Any]],
    about: dict[str, str] | None = None,
) -> Path:
    """Write down which results a run consists of, so that `tasks.export` finds them again.

    With its scores, and `about` (name, date, report), so that the next one can say what changed.
    """
    stages = ("prepared", "base", "banks", "bank_of", "stacking")
    seeds: dict[str, dict[str, Any]] = {}
    for item in summaries:
        own = seeds.setdefault(str(item["seed"]), {})
        own[item["lamp_task"]] = {stage: item[stage] for stage in stages}
        if compared := item.get("compared"):
            intervals = compared["value"]["intervals"]
            own[item["lamp_task"]]["compared"] = {"value": {"intervals": intervals}}
    text = json.dumps({"config": config, "about": about, "seeds": seeds}) + "\n"
    return write_state(f"{RUNS_FOLDER}/{name}.json", text)


def run_files(where: Store) -> list[Path]:
    """The files of all runs, the one that ended last first."""
    files = (where.root.parent / RUNS_FOLDER).glob("*.json")
    return sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)


def read_run(where: Store, wanted: str = "last") -> dict[str, Any]:
    """A run as `write_run` left it, by its name, its id or its file; `last` ended last.

    Raises InputError where there is none, or it cannot be read.
    """
    files = run_files(where)
    if not files:
        raise InputError(f"{where.root.parent / RUNS_FOLDER}: no run yet; run the flow first")
    if wanted == "last":
        return _read(files[0])
    for file in (Path(wanted), *(file for file in files if file.stem == wanted)):
        if file.is_file():
            return _read(file)
    named: dict[str, dict[str, Any]] = {}
    for file in files:
        with suppress(InputError):  # another run's file, which cannot be read
            run = _read(file)
            named.setdefault(str((run.get("about") or {}).get("name")), run)
    if wanted not in named:
        few = ", ".join(list(named)[:5])
        raise InputError(f"--run {wanted}: neither a run nor a file of one; the last are {few}")
    return named[wanted]


def shown_run(run: dict[str, Any]) -> str:
    """How a run is called where something is taken from it."""
    about = run.get("about")
    return f"the run {about['name']} of {about['date']}" if about else "this run"


def _read(file: Path) -> dict[str, Any]:
    try:
        run: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--run {file}: cannot be read ({error})") from error
    return run

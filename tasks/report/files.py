"""What runs leave beside the store, in `.mta`: a file for each run, its table and its report."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from tasks.config.run import RunConfig
from tasks.errors import InputError
from tasks.files import write_atomic
from tasks.results.run import Run
from tasks.results.store import store

# One small file per flow run: what it consists of.
RUNS_FOLDER = "runs"
# Tables and reports of all runs, by the run's name; and links to the newest of each.
REPORTS_FOLDER = "reports"
TABLE_FILE = "last_comparison.txt"
REPORT_FILE = "report.html"


def write_state(name: str, text: str) -> Path:
    """Write a small file beside the store (`.mta/<name>`), whole or not at all."""
    path = store().state / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode("utf-8"))
    return path


def begun(run_id: str, name: str, config: RunConfig) -> Run:
    """The record of a run that begins."""
    settings, report = config.model_dump(mode="json"), report_name(name, run_id)
    return Run(id=run_id, name=name, date=now(), report=report, config=settings)


def now() -> str:
    """The time of this machine, to the minute."""
    return f"{datetime.now():%Y-%m-%d %H:%M}"


def report_name(run: str, run_id: str) -> str:
    """The name of a run's table and report: as the run's, with its id if that name is taken."""
    name = re.sub(r"[^\w.-]+", "-", run).strip("-.")[:80] or "run"
    known = any((store().state / REPORTS_FOLDER).glob(f"{name}.*"))
    return f"{name}-{run_id[:8]}" if known else name


def write_report(name: str, link: str, text: str) -> Path:
    """Write a run's table or report, and point the link to it; returns the file.

    name: of `report_name`. link: TABLE_FILE or REPORT_FILE, whose ending the file gets.
    """
    path = write_state(f"{REPORTS_FOLDER}/{name}{Path(link).suffix}", text)
    newest = path.parent.parent / link
    new = newest.with_name(f".{link}-{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(path.relative_to(newest.parent))
    new.replace(newest)
    return path


def write_run(run: Run) -> Path:
    """Write a run's record; returns its file."""
    return write_state(f"{RUNS_FOLDER}/{run.id}.json", run.model_dump_json() + "\n")


def run_files() -> list[Path]:
    """The files of all runs, the one that ended last first."""
    files = (store().state / RUNS_FOLDER).glob("*.json")
    return sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)


def all_runs(but: str = "") -> Iterator[Run]:
    """The runs that this version can read, the one that ended last first. but: one to leave out."""
    for file in run_files():
        with suppress(InputError):
            if file.stem != but:
                yield _read(file)


def read_run(wanted: str = "last") -> Run:
    """A run as `write_run` left it, by its name, its id or its file; `last` ended last.

    Raises InputError where there is none, or it cannot be read.
    """
    files = run_files()
    if not files:
        folder = store().state / RUNS_FOLDER
        raise InputError(f"{folder}: no run is here, or each was forgotten; `mta run` makes one")
    if wanted == "last":
        return _read(files[0])
    for file in (Path(wanted), *(file for file in files if file.stem == wanted)):
        if file.is_file():
            return _read(file)
    runs = list(all_runs())
    for run in runs:
        if run.name == wanted:
            return run
    few = ", ".join(list(dict.fromkeys(run.name for run in runs))[:5])
    raise InputError(f"--run {wanted}: neither a run nor a file of one; the last are {few}")


def shown_run(run: Run) -> str:
    """A run as messages call it."""
    return f"the run {run.name} of {run.date}"


def _read(file: Path) -> Run:
    try:
        return Run.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InputError(f"--run {file}: cannot be read ({error})") from error
    except ValidationError as error:
        raise InputError(
            f"--run {file}: cannot be read as a run ({error.errors()[0]['msg']}); if another "
            "version wrote it, run the flow again"
        ) from error

"""The run in MLflow: begun when the flow begins, and logged whole when it has ended.

Stages do not log: one that is found would log nothing. All that MLflow gets is read from the run
and the store. So a run that found everything is as complete as the one that made it, and logging a
run again, also after a kill, leaves it in MLflow once.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from tasks.errors import InputError, short
from tasks.log import log
from tasks.report.files import REPORTS_FOLDER
from tasks.report.table import mean_rows, rows
from tasks.results.run import Run
from tasks.results.store import store
from tasks.tracking.entries import Entry, parts, whole
from tasks.tracking.server import (
    KEY_TAG,
    NOTE_TAG,
    PARENT_TAG,
    Mlflow,
    methods_page,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

# More than so many wait for MLflow's database.
THREADS = 4
# Bytes of an adapter. A smaller one is uploaded as fast as MLflow says whether it has it.
LARGE = 10_000_000
MINUTE = 60_000


@dataclass
class Tracking:
    """A run that is under way. page, report: where a browser finds them; None where MLflow
    gives none."""

    mlflow: Mlflow
    page: str | None = None
    report: str | None = None

    def log(self, run: Run) -> str:
        """Log all of the run. Returns what to do where MLflow does not take it, else nothing."""
        try:
            run_id = log_run(run, self.mlflow)
            self.report = self.mlflow.page(run_id, "/artifacts/report.html")
        except Exception as error:
            again = f"`mta log {shlex.quote(run.name)}` logs the run"
            return f"; MLflow did not take all of it ({reason(error)}): {again}"
        return ""


@contextmanager
def tracked(run: Run) -> Iterator[Tracking]:
    """The run in MLflow, if that answers, for the time of the block; FAILED if the block raises."""
    tracking, run_id = Tracking(Mlflow(tracking_uri())), None
    mlflow = tracking.mlflow
    try:
        run_id = mlflow.run(whole(run))
        tracking.page = mlflow.page(run_id)
        mlflow.fill(run_id, whole(run))
        end_abandoned(mlflow, run_id)
    except Exception as error:
        log(f"MLflow does not take what it is given: {reason(error)}", warning=True)
    try:
        yield tracking
    except BaseException as error:
        if run_id:
            with suppress(Exception):
                mlflow.client.set_tag(run_id, "failure", reason(error))
                mlflow.client.set_terminated(run_id, "FAILED")
        raise


def log_run(run: Run, mlflow: Mlflow) -> str:
    """Log a run that has ended, the first time or again; the id of its run in MLflow.

    Raises what MLflow's client does, and InputError where a file of the store is gone.
    """
    tables = [rows([cell]) for cell in run.cells]
    means = mean_rows(run.overall) if run.overall else []
    entry = whole(run, means, _texts(run, [row for table in [*tables, means] for row in table]))
    run_id = mlflow.run(entry)
    _log_parts(mlflow, run_id, list(parts(run, tables)))
    links = {
        "report": mlflow.page(run_id, "/artifacts/report.html"),
        "methods": mlflow.address(methods_page(mlflow.experiment, run_id)),
    }
    ways = ", ".join(f"[{name}]({link})" for name, link in links.items() if link)
    described = "\n\n".join(filter(None, [*run.summary, ways]))
    mlflow.fill(run_id, entry)
    mlflow.client.set_tag(run_id, "missing", str(len(run.missing)))
    mlflow.client.set_tag(run_id, NOTE_TAG, described)
    with suppress(Exception):  # it has this tag only if it was taken for killed
        mlflow.client.delete_tag(run_id, "failure")
    # The run's date has minutes only.
    end = min(int(1000 * time.time()), entry.end + MINUTE)
    mlflow.client.set_terminated(run_id, "FAILED" if run.missing else "FINISHED", end)
    return run_id


def _log_parts(mlflow: Mlflow, run_id: str, entries: Sequence[Entry]) -> None:
    # What somebody deleted in MLflow stays deleted.
    children = mlflow.search(f"tags.`{PARENT_TAG}` = '{run_id}'", deleted=True)
    known = {child.data.tags[KEY_TAG]: child for child in children}
    with ThreadPoolExecutor(THREADS, thread_name_prefix="mlflow") as pool:
        # Where one fails, those that wait are not begun.
        list(pool.map(partial(_log_part, mlflow, run_id, known), entries))


def _log_part(mlflow: Mlflow, parent: str, known: Mapping[str, MlflowRun], entry: Entry) -> None:
    found = known.get(entry.key)
    if found and (found.info.status == "FINISHED" or found.info.lifecycle_stage == "deleted"):
        return  # it is ended last, so all of it was logged
    run_id = found.info.run_id if found else mlflow.begin(entry, parent)
    mlflow.fill(run_id, _without_copy(mlflow, run_id, entry))
    mlflow.client.set_terminated(run_id, "FINISHED", entry.end)


def _without_copy(mlflow: Mlflow, run_id: str, entry: Entry) -> Entry:
    """The entry without a large adapter that an earlier run holds; a tag names that run."""
    paths = [path for file, _ in entry.files for path in store().path(file).rglob("*")]
    if sum(path.stat().st_size for path in paths) < LARGE:
        return entry
    same = f"tags.result_sha256 = '{entry.tags['result_sha256']}' and tags.artifacts_in IS NULL"
    holding = mlflow.search(f"{same} and attributes.status = 'FINISHED'")
    if not holding:
        return entry
    mlflow.client.set_tag(run_id, "artifacts_in", holding[0].info.run_id)
    return replace(entry, files=())


def _texts(run: Run, table: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the run shows: path in MLflow -> text."""
    import polars as pl

    texts = {"comparison.csv": pl.from_dicts(table, infer_schema_length=None).write_csv()}
    for name in ("comparison.txt", "report.html"):
        path = store().state / REPORTS_FOLDER / f"{run.report}{Path(name).suffix}"
        if path.exists():
            texts[name] = path.read_text(encoding="utf-8")
    if run.missing:
        texts["missing.txt"] = "\n".join(run.missing) + "\n"
    return texts


def end_abandoned(mlflow: Mlflow, own: str) -> None:
    """End runs that MLflow takes to be under way although their flow run is over."""
    for run in mlflow.search("attributes.status = 'RUNNING' and tags.kind = 'benchmark'"):
        run_id = run.info.run_id
        if run_id != own and flow_run_is_over(run.data.tags["prefect_flow_run"]):
            mlflow.client.set_tag(run_id, "failure", "its flow run was killed")
            mlflow.client.set_terminated(run_id, "KILLED")


def flow_run_is_over(flow_run_id: str) -> bool:
    """Whether a flow run has ended; one that the server does not know may live elsewhere."""
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(flow_run_id)).state
        except (ObjectNotFound, ValueError):
            return False
    return state is not None and state.is_final()


def reason(error: BaseException) -> str:
    """An error as one short line that shows no password."""
    text = short(error, 500)
    if not isinstance(error, InputError):
        text = f"{type(error).__name__}: {text}"
    return text[:500]

"""The run in MLflow: begun when the flow begins, and logged whole when it has ended.

Stages do not log: one that is found would log nothing. All that MLflow gets is read from the run
and the store. So a run that found everything is as complete as the one that made it, and logging a
run again, also after a kill, leaves it in MLflow once.
"""

import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from uuid import UUID

from prefect.artifacts import create_link_artifact
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from tasks.errors import InputError, short
from tasks.log import log
from tasks.report.files import REPORTS_FOLDER
from tasks.report.table import Row, mean_rows, rows
from tasks.results.run import Run
from tasks.results.store import store
from tasks.tracking.entries import Entry, parts, whole
from tasks.tracking.registry import register
from tasks.tracking.server import NOTE_TAG, PARENT_TAG, Mlflow, methods_page, tracking_uri

# More than so many wait for MLflow's database.
THREADS = 4
# Bytes of an adapter. A smaller one is uploaded as fast as MLflow says whether it has it.
LARGE = 10_000_000
MINUTE = 60_000


@contextmanager
def tracked(run: Run) -> Iterator[str | None]:
    """Keep the run open in MLflow for the block, if MLflow answers; gives its page, if it has one.

    The run is FAILED if the block raises.
    """
    mlflow, run_id, page = Mlflow(tracking_uri()), None, None
    try:
        run_id = log_whole(mlflow, whole(run))
        page = mlflow.page(run_id)
        end_abandoned(mlflow, run_id)
    except Exception as error:
        log(f"MLflow does not take what it is given: {reason(error)}", warning=True)
    try:
        yield page
    except BaseException as error:
        if run_id:
            with suppress(Exception):
                mlflow.client.set_tag(run_id, "failure", reason(error))
                mlflow.client.set_terminated(run_id, "FAILED")
        raise


def log_ended(run: Run) -> str:
    """Log a run that has ended, with the way to its report in the Prefect UI.

    Returns what to do where MLflow does not take it, else nothing.
    """
    mlflow = Mlflow(tracking_uri())
    try:
        report = mlflow.page(log_run(run, mlflow), "/artifacts/report.html")
    except Exception as error:
        again = f"`mta log {shlex.quote(run.name)}` logs the run"
        return f"; MLflow did not take all of it ({reason(error)}): {again}"
    if report:
        create_link_artifact(link=report, link_text="The report in MLflow", key="report")
    return ""


def log_run(run: Run, mlflow: Mlflow) -> str:
    """Log a run that has ended, the first time or again; the id of its run in MLflow.

    Raises what MLflow's client does, and InputError where a file of the store is gone.
    """
    tables = [rows([cell]) for cell in run.cells]
    means = mean_rows(run.overall) if run.overall else []
    entry = whole(run, means, _texts(run, [row for table in [*tables, means] for row in table]))
    run_id = log_whole(mlflow, entry)
    _log_parts(mlflow, run_id, parts(run, tables))
    if run.config.get("mlflow", {}).get("register_bank"):
        register(mlflow, run_id, run)
    links = {
        "report": mlflow.page(run_id, "/artifacts/report.html"),
        "methods": mlflow.address(methods_page(mlflow.experiment, run_id)),
    }
    ways = ", ".join(f"[{name}]({link})" for name, link in links.items() if link)
    described = "\n\n".join(filter(None, [*run.summary, ways]))
    mlflow.client.set_tag(run_id, NOTE_TAG, described)
    with suppress(Exception):  # only a run that was taken for killed has this tag
        mlflow.client.delete_tag(run_id, "failure")
    # The run's date has minutes only.
    end = min(int(1000 * time.time()), entry.end + MINUTE)
    mlflow.client.set_terminated(run_id, "FAILED" if run.missing else "FINISHED", end)
    return run_id


def log_whole(mlflow: Mlflow, entry: Entry) -> str:
    """Log the run itself, the first time or again; its id."""
    known = mlflow.search(f"tags.prefect_flow_run = '{entry.tags['prefect_flow_run']}'")
    return mlflow.log(entry, known[0] if known else None)


def _log_parts(mlflow: Mlflow, parent: str, entries: Iterable[Entry]) -> None:
    # What somebody deleted in MLflow stays deleted.
    children = mlflow.search(f"tags.`{PARENT_TAG}` = '{parent}'", deleted=True)
    known = {_part_of(child.data.tags): child for child in children}

    def log_part(entry: Entry) -> None:
        run = known.get(_part_of(entry.tags))
        if run and (run.info.status == "FINISHED" or run.info.lifecycle_stage == "deleted"):
            return  # a part is ended last, so all of this one was logged
        run_id = mlflow.log(_without_copy(mlflow, entry), run, parent)
        mlflow.client.set_terminated(run_id, "FINISHED", entry.end)

    with ThreadPoolExecutor(THREADS, thread_name_prefix="mlflow") as pool:
        # Where one fails, those that wait are not begun.
        list(pool.map(log_part, entries))


def _part_of(tags: Mapping[str, str]) -> tuple[str | None, ...]:
    """What of a run a child in MLflow is of; an anchor's name may have been forgotten there."""
    return tuple(tags.get(name) for name in ("lamp_task", "seed", "method", "result"))


def _without_copy(mlflow: Mlflow, entry: Entry) -> Entry:
    """The entry without a large adapter that an earlier run holds; a tag names that run."""
    paths = [path for file, _ in entry.files for path in store().path(file).rglob("*")]
    if sum(path.stat().st_size for path in paths) < LARGE:
        return entry
    same = f"tags.result = '{entry.tags['result']}' and tags.artifacts_in IS NULL"
    holding = mlflow.search(f"{same} and attributes.status = 'FINISHED'")
    if not holding:
        return entry
    return replace(entry, files=(), tags=entry.tags | {"artifacts_in": holding[0].info.run_id})


def _texts(run: Run, table: Sequence[Row]) -> dict[str, str]:
    """What the run shows: path in MLflow -> text."""
    import polars as pl

    folder = store().state / REPORTS_FOLDER
    texts = {"comparison.csv": pl.from_dicts(table, infer_schema_length=None).write_csv()}
    for name, ending in (("comparison.txt", "txt"), ("report.html", "html")):
        if (path := folder / f"{run.report}.{ending}").exists():
            texts[name] = path.read_text(encoding="utf-8")
    if run.missing:
        texts["missing.txt"] = "\n".join(run.missing) + "\n"
    return texts


def end_abandoned(mlflow: Mlflow, but: str) -> None:
    """End other runs that MLflow takes to be under way although their flow run is over.

    but: the id of the run that is under way.
    """
    for run in mlflow.search("attributes.status = 'RUNNING' and tags.kind = 'benchmark'"):
        run_id = run.info.run_id
        if run_id != but and flow_run_is_over(run.data.tags["prefect_flow_run"]):
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
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"

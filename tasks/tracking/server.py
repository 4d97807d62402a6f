"""One MLflow: where it is, its experiment `mta`, and runs in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from tasks.databases import MLFLOW, make_whole
from tasks.errors import InputError, masked
from tasks.results.store import store
from tasks.tracking.entries import Entry

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

EXPERIMENT = "mta"
PARENT_TAG, NOTE_TAG = "mlflow.parentRunId", "mlflow.note.content"
# MLflow's pages for training runs; by itself it opens those for chats' traces.
RUNS_VIEW = "?workflowType=machine_learning"
# The most that MLflow finds in one search.
RUNS = 1000
SETTINGS = {
    # MLflow would try for minutes, and make a run twice where an answer was lost.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow logs each step of saving a model.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # Saves two requests for each run.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class Mlflow:
    """The MLflow at an address. All that asks it raises what MLflow's client does."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @cached_property
    def client(self) -> MlflowClient:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    @cached_property
    def experiment(self) -> str:
        """The id of the experiment, which is made where there is none."""
        if known := self.client.get_experiment_by_name(EXPERIMENT):
            return str(known.experiment_id)
        # Without a server MLflow would put artifacts below the working folder.
        artifacts = (_alone() / "artifacts").as_uri() if self.uri.startswith("sqlite:") else None
        # The tag opens the experiment on its runs and charts, not on traces of chats.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        made = str(self.client.create_experiment(EXPERIMENT, artifacts, tags))
        note = (
            f"[All methods of all runs]({methods_page(made)}): select some and press *Compare*. "
            "One run per benchmark; below it one per LaMP task and method, and one per anchor."
        )
        self.client.set_experiment_tag(made, NOTE_TAG, note)
        return made

    def search(self, query: str, deleted: bool = False) -> list[MlflowRun]:
        """All runs of the experiment that a query finds."""
        from mlflow.entities import ViewType

        view = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY
        return all_pages(partial(self.client.search_runs, [self.experiment], query, view, RUNS))

    def log(self, entry: Entry, run: MlflowRun | None, parent: str | None = None) -> str:
        """Log an entry into its run, or where that is None into a new one; its id.

        What the run has already is written over by the same. Raises InputError where a file of the
        store is gone.
        """
        from mlflow.entities import DatasetInput, Metric, Param, RunTag

        # A new run has them from the start.
        tags = [RunTag(name, value) for name, value in entry.tags.items()] if run else []
        if run is None:
            first_tags = entry.tags | ({PARENT_TAG: parent} if parent else {})
            run = self.client.create_run(self.experiment, entry.start, first_tags, entry.name)
        run_id = str(run.info.run_id)
        params = [Param(name, str(value)[:500]) for name, value in entry.params.items()]
        points = [Metric(name, value, entry.end, step) for name, value, step in entry.metrics]
        self.client.log_batch(run_id, points, params, tags)
        for file, folder in entry.files:
            self.client.log_artifact(run_id, str(store().path(file)), folder)
        for path, text in entry.texts.items():
            self.client.log_text(run_id, text, path)
        if entry.data:
            self.client.log_inputs(run_id, [DatasetInput(one) for one in entry.data])
        return run_id

    def page(self, run_id: str, below: str = RUNS_VIEW) -> str | None:
        """Where a browser finds a run, or what is `below` it; None where MLflow is no server."""
        return self.address(f"#/experiments/{self.experiment}/runs/{run_id}{below}")

    def address(self, page: str) -> str | None:
        if not self.uri.startswith("http"):
            return None
        return f"{masked(os.environ.get('MTA_MLFLOW_UI', self.uri)).rstrip('/')}/{page}"


def all_pages(search: Callable[..., Any]) -> list[Any]:
    """What one of MLflow's searches finds, all pages of it."""
    page = search(page_token=None)
    rows = list(page)
    while page.token:
        page = search(page_token=page.token)
        rows += page
    return rows


def methods_page(experiment: str, run_id: str | None = None) -> str:
    """The page of the methods' runs, of one benchmark or of all, below an MLflow's address.

    Sorted by a parameter: MLflow then lists them one by one, not folded below their parents.
    """
    of_run = f" and tags.{PARENT_TAG} = '{run_id}'" if run_id else ""
    wanted = {"searchFilter": f"tags.kind = 'method'{of_run}", "orderByKey": "params.`lamp_task`"}
    return f"#/experiments/{experiment}/runs{RUNS_VIEW}&{urlencode(wanted, quote_via=quote)}"


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a SQLite file beside the store, which no server has open.

    Raises InputError where that file cannot be used or made.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    _alone().mkdir(parents=True, exist_ok=True)
    make_whole(MLFLOW, _alone() / "mlflow.db")
    return f"sqlite:///{_alone() / 'mlflow.db'}"


def mlflow_uris(state: Path) -> list[str]:
    """Where MLflow may know of the runs whose store lies in `state`.

    `MLFLOW_TRACKING_URI`; else the local stack's server and the file that runs without one use.
    Raises InputError where the stack has an MLflow that does not run.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return [uri]
    uris, running = [], state / "run" / "mlflow.json"
    if (state / "mlflow" / "mlflow.db").exists():
        if not running.exists():
            raise InputError(
                f"{state / 'mlflow'}: the stack's MLflow does not run, and knows users too; "
                "`make up` first"
            )
        uris.append(f"http://127.0.0.1:{json.loads(running.read_text())['port']}")
    if (alone := state / "local" / "mlflow.db").exists():
        uris.append(f"sqlite:///{alone}")
    return uris


def known_mlflow() -> Mlflow:
    """The MLflow that knows the runs of this store, or the one that they would be logged to.

    Raises InputError as `mlflow_uris` and `tracking_uri` do.
    """
    return Mlflow((mlflow_uris(store().state) or [tracking_uri()])[0])


def _alone() -> Path:
    """Where the MLflow of runs without a server is."""
    return store().state / "local"

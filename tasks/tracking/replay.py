"""What a run logs, given to an MLflow server entry by entry (`spool` keeps the entries).

An entry may come twice, where a process died between an answer of the server and noting it, so
each is made to change nothing the second time: a run is found by its key before it is made, a
metric has its time and step, and tags, parameters and artifacts are written over by the same.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from tasks.errors import InputError, masked
from tasks.store.artifacts import Store

EXPERIMENT = "mta"
PARENT_TAG = "mlflow.parentRunId"
KEY_TAG = "mta.key"
# MLflow takes at most this many parameters and metric values in one call, and of parameters.
VALUES_PER_CALL = 1000
PARAMS_PER_CALL = 100
# MLflow's pages for training runs; by itself it opens those for chats' traces.
RUNS_VIEW = "?workflowType=machine_learning"
NOTE_TAG = "mlflow.note.content"
# The spool tries again, and later. MLflow's own way, minutes of waiting within a call and runs made
# twice where an answer was lost, is not for a training to wait for.
CALMLY = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


class RunGone(InputError):
    """MLflow has no run of `key`: it was removed there, or another MLflow took its start."""

    def __init__(self, uri: str, key: str) -> None:
        super().__init__(f"MLflow at {uri}: the run that this belongs to is gone")
        self.key = key


class Replay:
    """One MLflow. Raises InputError for an address that none can have."""

    def __init__(self, uri: str, where: Store) -> None:
        for name, value in CALMLY.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self.uri, self.where = uri, where
        try:
            self.client = MlflowClient(uri)
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            raise InputError(
                f"MLflow at {uri}: cannot be used ({why}); set MLFLOW_TRACKING_URI"
            ) from error
        self._experiment: str | None = None
        # Ids of runs by their keys, and keys whose run this process may have made already.
        self._runs: dict[str, str] = {}
        self._tried: set[str] = set()
        # Where the artifacts of a run lie, by its id: MLflow's client asks that anew for each run.
        self._places: dict[str, str] = {}

    def take(self, entry: dict[str, Any], folder: Path, anew: bool) -> None:
        """Log one entry; files that it names lie in `folder`. anew: nobody has tried it before.

        Raises what MLflow's client does, InputError where a piece of the store is gone, and
        StorageError where the store does not say whether it is.
        """
        kind, key = entry["kind"], entry["key"]
        if kind == "run":
            self._start(entry, anew)
            return
        run = self.run_id(key)
        if kind == "values":
            self._values(run, entry["params"], entry["metrics"])
        elif kind == "tags":
            for name, value in entry["tags"].items():
                self.client.set_tag(run, name, value)
        elif kind == "file":
            self._file(run, folder / entry["file"], entry["path"])
        elif kind == "piece":
            self._piece(run, entry)
        elif kind == "end":
            self.client.set_terminated(run, entry["status"], entry["time"])
        else:
            raise InputError(f"spool {folder}: no entry is of kind {kind}")

    def run_id(self, key: str) -> str:
        """The run of a key. Raises RunGone where MLflow has none."""
        found = self.known(key) or self._search(key)
        if found is None:
            raise RunGone(self.uri, key)
        return found

    def known(self, key: str) -> str | None:
        """The run of a key, as far as this process knows without asking."""
        return self._runs.get(key)

    @property
    def experiment(self) -> str:
        if self._experiment is None:
            self._experiment = self._find_experiment()
        return self._experiment

    def _start(self, entry: dict[str, Any], anew: bool) -> None:
        key = entry["key"]
        sure = anew and key not in self._tried
        self._tried.add(key)
        if not sure and self._search(key):
            return
        tags = entry["tags"] | {KEY_TAG: key}
        if entry["parent"]:
            tags[PARENT_TAG] = self.run_id(entry["parent"])
        made = self.client.create_run(
            self.experiment, start_time=entry["time"], run_name=entry["name"], tags=tags
        )
        self._runs[key] = made.info.run_id
        self._places[made.info.run_id] = made.info.artifact_uri

    def _search(self, key: str) -> str | None:
        from mlflow.entities import ViewType

        # Keys are hexadecimal: nothing in them can end the quotes.
        query = f"tags.`{KEY_TAG}` = '{key}'"
        for run in self.client.search_runs([self.experiment], query, ViewType.ALL, 1):
            self._runs[key] = run.info.run_id
        return self._runs.get(key)

    def _values(self, run: str, params: dict[str, str], metrics: list[list[Any]]) -> None:
        from mlflow.entities import Metric, Param

        names = [Param(name, value) for name, value in params.items()]
        points = [Metric(name, float(value), time, step) for name, value, time, step in metrics]
        while names or points:
            some, names = names[:PARAMS_PER_CALL], names[PARAMS_PER_CALL:]
            room = VALUES_PER_CALL - len(some)
            self.client.log_batch(run, metrics=points[:room], params=some)
            points = points[room:]

    def _file(self, run: str, file: Path, path: str) -> None:
        # As a text, so that it gets its own name: in the spool it has another.
        self.client.log_text(run, file.read_text(encoding="utf-8"), path)

    def _piece(self, run: str, entry: dict[str, Any]) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        path = self.where.open(entry["ref"]).folder / entry["inside"]
        if run not in self._places:
            self._places[run] = self.client.get_run(run).info.artifact_uri
        files = get_artifact_repository(self._places[run], tracking_uri=self.uri)
        if path.is_dir():
            files.log_artifacts(str(path), entry["to"])
        else:
            files.log_artifact(str(path), entry["to"])

    def _find_experiment(self) -> str:
        found = self.client.get_experiment_by_name(EXPERIMENT)
        if found:
            return str(found.experiment_id)
        made = self._make_experiment()
        self.client.set_experiment_tag(
            made,
            NOTE_TAG,
            f"[All methods of all runs]({methods_page(made)}): select some and press *Compare*. "
            "One run per benchmark; below it one per LaMP task and method, and one per anchor.",
        )
        return made

    def _make_experiment(self) -> str:
        artifacts = None
        if self.uri.startswith("sqlite:"):
            # Without a server MLflow would put artifacts below the working folder.
            artifacts = (self.where.root.parent / "local" / "artifacts").as_uri()
        try:
            # The tag opens the experiment on its runs and charts, not on traces of chats.
            return self.client.create_experiment(
                EXPERIMENT,
                artifact_location=artifacts,
                tags={"mlflow.experimentKind": "custom_model_development"},
            )
        except Exception:
            # Another run created it between the two calls.
            found = self.client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
            return str(found.experiment_id)


def methods_page(experiment: str, run: str | None = None) -> str:
    """The page of the methods' runs, of one benchmark or of all, below an MLflow's address.

    Sorted by a parameter: MLflow then lists them one by one, not folded below their parents.
    """
    wanted = "tags.kind = 'method'"
    if run is not None:
        wanted += f" and tags.{PARENT_TAG} = '{run}'"
    query = urlencode({"searchFilter": wanted, "orderByKey": "params.`lamp_task`"}, quote_via=quote)
    return f"#/experiments/{experiment}/runs{RUNS_VIEW}&{query}"


def target(uri: str) -> str:
    """Which MLflow an address is of, to be written down: no password, and no port, which changes.

    A server by its host and path, behind which there may be several, or a database file.
    """
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        return f"{parts.scheme}://{parts.hostname}{parts.path.rstrip('/')}"
    return masked(uri)


def mlflow_uris(state: Path) -> list[str]:
    """Where MLflow may know of the runs whose store lies in `state`.

    `MLFLOW_TRACKING_URI`; else the local stack's server and the file that runs without one use.
    Raises InputError where the stack has an MLflow that does not run.
    """
    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        return [given]
    uris = []
    if (state / "mlflow" / "mlflow.db").exists():
        try:
            port = json.loads((state / "run" / "mlflow.json").read_text())["port"]
        except (OSError, ValueError, KeyError):
            raise InputError(
                f"{state / 'mlflow'}: the stack's MLflow does not run, and knows users too; "
                "`make up` first"
            ) from None
        uris.append(f"http://127.0.0.1:{port}")
    if (alone := state / "local" / "mlflow.db").exists():
        uris.append(f"sqlite:///{alone}")
    return uris

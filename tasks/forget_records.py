"""A user to forget, in MLflow's and Prefect's records."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from tasks.errors import InputError, label, masked
from tasks.holding import WRITTEN, Marks, holds
from tasks.replay import EXPERIMENT

SEARCHED = (".parquet", ".json", *WRITTEN)
# Made of the same users as the tables beside them, without a name in them.
PICTURES = ("map.png", "golds.json")
FORGOTTEN = "forgotten"


@dataclass
class Records:
    """done: what was removed, counted; left: what could not be; flow_runs: whose runs these are."""

    done: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)
    flow_runs: set[str] = field(default_factory=set)

    def __add__(self, other: Records) -> Records:
        return Records(
            self.done + other.done, self.left + other.left, self.flow_runs | other.flow_runs
        )


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


def forget_in_mlflow(uri: str, marks: Marks, anchors: set[str], uris: set[str]) -> Records:
    """Artifacts that hold the user, and runs of results in `uris`, out of MLflow.

    A run of an anchor trained on the user goes whole; of others go the tables and pages that hold
    the user, so that metrics stay. `anchors`: names of anchors trained on the user.
    """
    found = Records()
    try:
        client = _client(uri)
        for run in _runs(client):
            _forget_run(client, uri, run, marks, anchors, uris, found)
    except Exception as error:
        found.left.append(_unreachable(uri, error))
    return found


def left_in_mlflow(uri: str, marks: Marks) -> list[str]:
    """What MLflow still has of the user, by a search over all runs, deleted ones too."""
    left = []
    try:
        client = _client(uri)
        for run in _runs(client):
            where = f"MLflow run {run.info.run_id}"
            told = {"name": run.info.run_name or "", **run.data.tags, **run.data.params}
            left += [f"{where}: {key}" for key, text in told.items() if _tells(key, text, marks)]
            left += [f"{where}: artifact {path}" for path in _holding(client, run, marks)]
    except Exception as error:
        left.append(_unreachable(uri, error))
    return left


def forget_in_prefect(flow_runs: set[str]) -> tuple[list[str], list[str]]:
    """The flow runs, with their task runs (named by anchors) and logs, out of Prefect."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
    from prefect.exceptions import ObjectNotFound
    from prefect.settings import PREFECT_API_URL

    wanted = {run for run in flow_runs if _is_uuid(run)}
    if not wanted:
        return [], []
    commands = [f"Prefect: `prefect flow-run delete {run}` (not reached)" for run in sorted(wanted)]
    if PREFECT_API_URL.value() is None:
        return [], commands
    removed = 0
    try:
        with get_client(sync_client=True) as client:
            for run in sorted(wanted):
                below = FlowRunFilter(
                    parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[UUID(run)])
                )
                inner = [flow_run.id for flow_run in client.read_flow_runs(flow_run_filter=below)]
                for each in (*inner, UUID(run)):
                    try:
                        client.delete_flow_run(each)
                        removed += 1
                    except ObjectNotFound:
                        continue
    except Exception:
        return [], commands
    return [f"Prefect: {removed} flow runs removed, with the names and logs of their tasks"], []


def _forget_run(
    client: Any, uri: str, run: Any, marks: Marks, anchors: set[str], uris: set[str], found: Records
) -> None:
    tags, run_id = run.data.tags, run.info.run_id
    whole = tags.get("kind") == "anchor" and (
        tags.get("result") in uris or tags.get("anchor") in {*map(label, anchors | marks.ids)}
    )
    if whole or tags.get("result") in uris:
        gone = _artifacts(client, run_id)
    else:
        gone = _holding(client, run, marks)
        if gone:
            gone += [p for p in _artifacts(client, run_id) if p.endswith((*PICTURES, ".html"))
                     and p not in gone]  # fmt: skip
    for path in gone:
        _repository(uri, run).delete_artifacts(path)
        found.done["MLflow artifacts"] += 1
    for key, text in tags.items():
        if _tells(key, text, marks):
            client.set_tag(run_id, key, FORGOTTEN)
            found.done["MLflow tags"] += 1
    if marks.words.search(run.info.run_name or ""):
        client.update_run(run_id, name=FORGOTTEN)
        found.done["MLflow run names"] += 1
    if whole and run.info.lifecycle_stage == "active":
        client.delete_run(run_id)
        found.done["MLflow runs of anchors"] += 1
    if (gone or whole) and (flow_run := tags.get("prefect_flow_run")):
        found.flow_runs.add(flow_run)


def _tells(key: str, text: str, marks: Marks) -> bool:
    """A tag's or parameter's value, where values may be about users: seeds and counts are not."""
    if key in ("anchor", "name", "failure", "mlflow.runName"):
        return marks.in_text(text)
    return any(part in text for part in marks.within)


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    # A bar per file would bury what is said.
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"

    return MlflowClient(uri)


def _runs(client: Any) -> Iterator[Any]:
    from mlflow.entities import ViewType

    experiment = client.get_experiment_by_name(EXPERIMENT)
    token = None
    while experiment:
        page = client.search_runs(
            [experiment.experiment_id],
            run_view_type=ViewType.ALL,
            max_results=500,
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


def _artifacts(client: Any, run_id: str, folder: str | None = None) -> list[str]:
    found: list[str] = []
    for item in client.list_artifacts(run_id, folder):
        found += _artifacts(client, run_id, item.path) if item.is_dir else [item.path]
    return found


def _holding(client: Any, run: Any, marks: Marks) -> list[str]:
    """The artifacts of a run that hold a mark."""
    found = []
    for path in _artifacts(client, run.info.run_id):
        if Path(path).suffix in SEARCHED:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(client.download_artifacts(run.info.run_id, path, folder))
                if holds(file, marks):
                    found.append(path)
    return found


def _repository(uri: str, run: Any) -> Any:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(run.info.artifact_uri, tracking_uri=uri)


def _unreachable(uri: str, error: Exception) -> str:
    why = " ".join(str(error).split())[:200]
    return masked(f"MLflow at {uri}: not searched ({type(error).__name__}: {why})")


def _is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True

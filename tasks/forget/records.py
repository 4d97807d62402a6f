"""A user to forget, in MLflow's and Prefect's records."""

from __future__ import annotations

import os
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from tasks.errors import label, masked
from tasks.forget.holding import WRITTEN, Marks, holds
from tasks.tracking.replay import EXPERIMENT

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


def forget_in_prefect(
    flow_runs: set[str], homes: Sequence[Path] = ()
) -> tuple[list[str], list[str]]:
    """The flow runs, with their task runs (named by anchors) and logs, out of Prefect.

    Out of the server that is set, and out of `homes`: where `python -m flows.mta` may have its
    database. A run that none of them knows is left: it may be on another server.
    """
    from prefect.settings import PREFECT_API_URL

    unknown = {run for run in flow_runs if _is_uuid(run)}
    address = PREFECT_API_URL.value()
    databases = [home for home in homes if (home / "prefect.db").exists()]
    asked: list[str] = []
    all_reached = bool(address or databases)
    removed = 0
    for place in ([address] if address else []) + databases:
        if not unknown:
            break
        try:
            with _server_on(place) if isinstance(place, Path) else nullcontext():
                removed += _delete_flow_runs(unknown)
            asked.append(masked(str(place)))
        except Exception:
            all_reached = False
    why = "not reached"
    if all_reached:
        why = f"unknown to {' and '.join(asked)}: where it ran, unless it is gone there"
    done = [f"Prefect: {removed} flow runs removed, with the names and logs of their tasks"]
    return done if removed else [], [
        f"Prefect: `prefect flow-run delete {run}` ({why})" for run in sorted(unknown)
    ]


@contextmanager
def _server_on(home: Path) -> Iterator[None]:
    """A Prefect server on the database in `home`, whose own is there only while a run is."""
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import (
        PREFECT_API_DATABASE_CONNECTION_URL,
        PREFECT_API_URL,
        PREFECT_HOME,
        PREFECT_SERVER_ANALYTICS_ENABLED,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
        temporary_settings,
    )

    settings: dict[Any, Any] = {
        PREFECT_HOME: home,
        # By name: another may be set, for the server of the stack.
        PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{home / 'prefect.db'}",
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
        # As in flows/local_server.py: on a busy machine it takes long.
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 180,
    }
    with temporary_settings(updates=settings, restore_defaults={PREFECT_API_URL}):
        # By a port: without one Prefect gives the server that this process has already.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = SubprocessASGIServer(port)
        server.start()
        try:
            with temporary_settings(updates={PREFECT_API_URL: server.api_url}):
                yield
        finally:
            server.stop()


def _delete_flow_runs(wanted: set[str]) -> int:
    """Delete flow runs, and those below, where the server knows them; they leave `wanted`.

    Returns how many were deleted.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
    from prefect.exceptions import ObjectNotFound

    removed = 0
    with get_client(sync_client=True) as client:
        for run in sorted(wanted):
            below = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[UUID(run)]))
            inner = [flow_run.id for flow_run in client.read_flow_runs(flow_run_filter=below)]
            for each in (*inner, UUID(run)):
                try:
                    client.delete_flow_run(each)
                except ObjectNotFound:
                    continue
                removed += 1
                wanted.discard(str(each))
    return removed


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

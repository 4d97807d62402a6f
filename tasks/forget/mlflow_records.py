"""A user to forget, in MLflow."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.errors import label, masked, short
from tasks.forget.holding import WRITTEN, Marks, holds
from tasks.tracking.server import PARENT_TAG, Mlflow

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

SEARCHED = (".parquet", ".json", *WRITTEN)
# Made of the same users as the tables beside them, without a name in them.
NAMELESS = ("map.png", "golds.json", ".html")
FORGOTTEN = "forgotten"


@dataclass(frozen=True)
class Trace:
    """What a run in MLflow has of a user: artifacts, and the names of tags and parameters.

    whole: it is of a LoRA that was trained on the user. flow_run: the Prefect run that logged it.
    """

    run: MlflowRun
    artifacts: list[str]
    names: list[str]
    whole: bool
    flow_run: str | None

    def lines(self) -> list[str]:
        """What it is, to be said."""
        found = (*self.names, *(f"artifact {path}" for path in self.artifacts))
        return [f"MLflow run {self.run.info.run_id}: {one}" for one in found]

    def remove(self, mlflow: Mlflow) -> None:
        """Remove it but for parameters, which MLflow does not take back. Metrics stay."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        info = self.run.info
        for path in self.artifacts:
            files = get_artifact_repository(info.artifact_uri, tracking_uri=mlflow.uri)
            files.delete_artifacts(path)
        for name in self.names:
            if name in self.run.data.tags:
                mlflow.client.set_tag(info.run_id, name, FORGOTTEN)
        if self.whole and info.lifecycle_stage == "active":
            mlflow.client.delete_run(info.run_id)


def traces_in_mlflow(
    uris: Iterable[str],
    marks: Marks,
    anchors: Iterable[str] = (),
    flow_runs: Set[str] = frozenset(),
    remove: bool = False,
) -> tuple[list[Trace], list[str]]:
    """What all runs have of a user, and a line for each MLflow that cannot be searched.

    anchors: whose LoRAs go, and their runs with them. flow_runs: those whose answers were made with
    such LoRAs, so that all their tables go. remove: it is removed at once.
    """
    found, failed = [], []
    for uri in uris:
        try:
            mlflow = Mlflow(uri)
            for trace in _traces(mlflow, marks, {*map(label, anchors)}, flow_runs):
                if remove:
                    trace.remove(mlflow)
                found.append(trace)
        except Exception as error:
            line = f"MLflow at {uri}: not searched ({type(error).__name__}: {short(error)})"
            failed.append(masked(line))
    return found, failed


def _traces(
    mlflow: Mlflow, marks: Marks, anchors: Set[str], flow_runs: Set[str]
) -> Iterator[Trace]:
    runs = mlflow.search("", deleted=True)
    flow_run_of = {run.info.run_id: run.data.tags.get("prefect_flow_run") for run in runs}
    for run in runs:
        tags, run_id = run.data.tags, run.info.run_id
        flow_run = flow_run_of.get(tags.get(PARENT_TAG, run_id))
        of_anchor = tags.get("kind") == "anchor"
        whole = of_anchor and tags.get("anchor") in anchors
        paths = list(_artifacts(mlflow, run_id))
        found = {
            path
            for path in paths
            if whole
            or (flow_run in flow_runs and not of_anchor and path.endswith(".parquet"))
            or (path.endswith(SEARCHED) and _holds(mlflow, run_id, path, marks))
        }
        if found:
            found |= {path for path in paths if path.endswith(NAMELESS)}
        told = {**tags, **run.data.params}
        names = [name for name, text in told.items() if _tells(name, text, marks)]
        if found or names or whole:
            yield Trace(run, sorted(found), names, whole, flow_run)


def _artifacts(mlflow: Mlflow, run_id: str, folder: str | None = None) -> Iterator[str]:
    for item in mlflow.client.list_artifacts(run_id, folder):
        if item.is_dir:
            yield from _artifacts(mlflow, run_id, item.path)
        else:
            yield item.path


def _holds(mlflow: Mlflow, run_id: str, path: str, marks: Marks) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        return holds(Path(mlflow.client.download_artifacts(run_id, path, folder)), marks)


def _tells(name: str, text: str, marks: Marks) -> bool:
    """A tag's or parameter's value, where values may be about users: seeds and counts are not."""
    if name in ("anchor", "failure", "mlflow.runName"):
        return marks.in_text(text)
    return any(part in text for part in marks.within)

"""What an MLflow holds, to be compared: by names, without ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run, ViewType


def runs_of(uri: str) -> list[Run]:
    """All runs of the experiment."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("mta")
    ids = [experiment.experiment_id] if experiment else []
    return list(client.search_runs(ids, run_view_type=ViewType.ALL)) if ids else []


def named(uri: str) -> dict[str, Run]:
    """All runs by name; each name is there once."""
    runs = runs_of(uri)
    found = {str(run.info.run_name): run for run in runs}
    assert len(found) == len(runs), sorted(str(run.info.run_name) for run in runs)
    return found


def logged(uri: str) -> dict[str, Any]:
    """All that MLflow holds, but ids and when the whole run began and ended."""
    client = MlflowClient(uri)
    runs = named(uri)
    names = {run.info.run_id: name for name, run in runs.items()}
    return {name: _content(client, run, names) for name, run in runs.items()}


def files(uri: str, run: Run) -> dict[str, int]:
    """A run's artifacts: path -> bytes."""
    return dict(_files(MlflowClient(uri), run.info.run_id, None))


def _content(client: MlflowClient, run: Run, names: dict[str, str]) -> dict[str, Any]:
    tags = dict(run.data.tags)
    parent = names.get(tags.pop("mlflow.parentRunId", ""))
    # The description links pages by their ids.
    tags["mlflow.note.content"] = tags.get("mlflow.note.content", "").split("\n\n[")[0]
    series = {
        name: sorted(
            (one.step, one.timestamp, one.value)
            for one in client.get_metric_history(run.info.run_id, name)
        )
        for name in run.data.metrics
    }
    times = (run.info.start_time, run.info.end_time) if parent else None
    return {
        "status": run.info.status,
        "times": times,
        "parent": parent,
        "tags": tags,
        "params": run.data.params,
        "metrics": series,
        "files": dict(_files(client, run.info.run_id, None)),
        "data": [one.dataset.to_dictionary() for one in run.inputs.dataset_inputs],
    }


def _files(client: MlflowClient, run_id: str, folder: str | None) -> Iterator[tuple[str, int]]:
    for item in client.list_artifacts(run_id, folder):
        if item.is_dir:
            yield from _files(client, run_id, item.path)
        else:
            yield item.path, item.file_size

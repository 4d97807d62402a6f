"""A dry run through the flow, and a run whose base model is adapted to the task."""

from __future__ import annotations

import json
from pathlib import Path

from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from infra.local.alone import parameters
from tests.flows.conftest import records
from tests.flows.test_flow import mlflow_runs, run

ADAPTED = {"task_adapt": {"enabled": True, "train_on": "profile", "max_items": 40, "rank": 2}}


def test_nothing_is_done_but_the_plan(workplace: Path, mlflow_file: str) -> None:
    before = len(experiment_runs(mlflow_file))
    given = parameters(["dry_run=true"])
    state = run(items_curve=[2], base={**ADAPTED, "model": "tiny"}, **given)
    assert state.is_completed(), state.message
    assert "nothing was trained" in (state.message or "")
    text = (workplace / ".mta" / "last_plan.md").read_text()
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads == [
        "# What the run would take",
        "## LaMP-2M",
        "## LaMP-2M, 2 items",
        "## All of 2",
    ]
    stages = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")}
    assert {"base model", "task adaptation", "embedding", "meta-LoRAs", "training"} <= stages
    store = workplace / ".mta" / "store"
    kept = {path.name for path in store.iterdir() if not path.name.startswith(".")}
    # The users, and what Prefect keeps of that stage.
    assert kept == {"prepare", "results"}
    assert {path.name.split("-")[0] for path in (store / "results").iterdir()} == {"prepare"}
    assert not (workplace / ".mta" / "last_comparison.txt").exists()
    assert len(experiment_runs(mlflow_file)) == before
    assert state.state_details.flow_run_id is not None
    with get_client(sync_client=True) as client:
        mine = ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id])
        found = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=mine))
    assert [item.data for item in found if item.key == "plan"] == [text]


def experiment_runs(address: str) -> list[str]:
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("mta")
    return (
        [r.info.run_id for r in client.search_runs([experiment.experiment_id])]
        if experiment
        else []
    )


def test_what_cannot_be_planned_is_one_line(workplace: Path) -> None:
    state = run(dry_run=True, base={"model": "/no/such/folder"})
    assert state.is_failed()
    assert "there is no such folder" in (state.message or "")


def test_an_adapted_base_model(workplace: Path, mlflow_file: str) -> None:
    state = run(base=ADAPTED, methods=["base"])
    assert state.is_completed(), state.message
    (record,) = records(workplace, "task_adapt").values()
    assert record["training"]["items"] == 40
    parent, _ = mlflow_runs(mlflow_file, state)
    path = MlflowClient(mlflow_file).download_artifacts(
        parent.info.run_id, "LaMP-2M/manifest.json", str(workplace)
    )
    manifest = json.loads(Path(path).read_text())
    assert manifest["base"]["adapter"]["uri"] == record["adapter"]["uri"]

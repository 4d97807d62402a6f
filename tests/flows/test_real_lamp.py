"""Files of LaMP's official shape through the whole pipeline, and the paper's preset on a model of
Llama 3's shape: what is missing from the paper's experiment are the weights and the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from mlflow import MlflowClient

from flows.mta import mta
from tasks.lamp.definitions import TASKS, get_task
from tasks.lamp.formats import read_users
from tests import llama3
from tests.flows.conftest import folders, records
from tests.official import FILE_NAMES, write_official
from tests.small import SMALL
from tests.unit.stages.test_embedding import minilm

METRICS = {
    "classification": {"accuracy", "macro_f1"},
    "rating": {"mae", "rmse"},
    "text": {"rouge1", "rougeL"},
}
# Eight LaMP tasks in few jobs, of little training: what is looked at is what comes of the files.
TINY: dict[str, Any] = {
    "lamp_tasks": list(TASKS),
    "methods": ["rag", "mta"],
    "base": {"tiny": SMALL["base"]["tiny"] | {"steps": 5}},
    **{section: SMALL[section] for section in ("meta_lora", "fusion", "compute")},
    "anchors": SMALL["anchors"] | {"count": 2, "per_job": 2},
    "stacking": SMALL["stacking"] | {"users_per_job": 64},
}


@pytest.mark.slow
def test_every_task_from_official_files(workplace: Path, mlflow_file: str) -> None:
    data = workplace / "data"
    for task in TASKS:
        write_official(data / task, task)
    state = mta(data=str(data), **TINY, return_state=True)
    assert state.is_completed(), state.message
    client = MlflowClient(mlflow_file)
    experiment = client.get_experiment_by_name("mta")
    assert experiment is not None
    flow_run = str(state.state_details.flow_run_id)
    ids = [experiment.experiment_id]
    (parent,) = client.search_runs(ids, f"tags.prefect_flow_run = '{flow_run}'")
    children = client.search_runs(
        ids, f"tags.mlflow.parentRunId = '{parent.info.run_id}' and tags.kind = 'method'"
    )
    found = {(c.data.tags["lamp_task"], c.data.tags["method"]): c for c in children}
    assert set(found) == {(task, method) for task in TASKS for method in TINY["methods"]}
    for (name, method), child in found.items():
        task = get_task(name)
        assert METRICS[task.kind] <= set(child.data.metrics)
        folder = Path(
            client.download_artifacts(child.info.run_id, "", str(workplace / name / method))
        )
        assert json.loads((folder / "golds.json").read_text())["task"] == FILE_NAMES[name]
    table = (workplace / ".mta" / "last_comparison.txt").read_text()
    assert "MISSING" not in table
    # Official LaMP-1 names no citation, and the table says what was asked instead.
    assert "note: LaMP-1: no paper names a citation" in table


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_preset_paper_on_a_model_of_llama_3s_shape(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`-p preset=paper -p model=<folder>`, all else as published, but for what has to be fetched
    (the text encoder is a small one from a package) and for how many anchors so few users give."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    data = write_official(workplace / "data", "LaMP-2M", users=16)
    profiles = read_users(data, get_task("LaMP-2M")).users["profile"].to_list()
    texts = [item["text"] for profile in profiles for item in profile]
    model = llama3.write_model(workplace / "llama-3-tiny", texts)
    state = mta(
        preset="paper",
        model=str(model),
        split="published",
        data=str(data),
        lamp_tasks=["LaMP-2M"],
        methods=["base", "mta"],
        anchors={"text_model": str(minilm()), "count": 3},
        return_state=True,
    )
    assert state.is_completed(), state.message
    (prepared,) = records(workplace, "prepare").values()
    # Published: users, not authors; exactly ten items each; a third of 16 users, at most 100.
    assert prepared["counts"]["few_shot_users"] == 5
    assert prepared["counts"]["unseen_few_shot_items"] == 5 * 2
    (shard,) = folders(workplace, "stacking")
    # Ten items, batches of 2 x 4: two steps; 14 linear layers of rank 4.
    assert set(pl.read_parquet(shard / "work.parquet")["steps"]) == {2}

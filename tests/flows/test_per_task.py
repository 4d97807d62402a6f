"""What differs per LaMP task is what MLflow says and what is exported.

The values are those given below, by hand; whether the stages took them shows in what they made.
"""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path

import polars as pl
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from prefect import State

from tasks.lamp.definitions import get_task
from tasks.lamp.prompts import question_text
from tasks.report.files import read_run
from tasks.results.store import store
from tasks.tools.main import main
from tests.flows.test_flow import mlflow_runs, run
from tests.unit.stages.pipeline import stock_answers

OWN = {
    "LaMP-2M": {
        "meta_lora": {"rank": 3, "epochs": 2},
        "stacking": {"rank": 1, "learning_rate": 1e-2, "epochs": 3},
        "fusion": {"merge": "factors"},
    },
    "LaMP-3": {"oppu": {"rank": 5, "batch_size": 2}, "anchors": {"count": 2}},
}
METHODS = ["oppu", "mta", "mta_published"]
# What each LaMP task has: the above over the small world's (tests/small.py) and the preset's.
WANTED = {
    "LaMP-2M": {
        "meta_lora.rank": "3",
        "meta_lora.epochs": "2",
        "stacking.rank": "1",
        "stacking.learning_rate": "0.01",
        "stacking.epochs": "3",
        "oppu.rank": "8",
        "oppu.batch_size": "4",
        "oppu.learning_rate": "0.005",
        "fusion.merge": "factors",
        "anchors.count": "3",
    },
    # The preset has an oppu.learning_rate of its own for LaMP-3.
    "LaMP-3": {
        "meta_lora.rank": "2",
        "meta_lora.epochs": "1",
        "stacking.rank": "2",
        "stacking.learning_rate": "0.0005",
        "stacking.epochs": "1",
        "oppu.rank": "5",
        "oppu.batch_size": "2",
        "oppu.learning_rate": "0.002",
        "fusion.merge": "exact",
        "anchors.count": "2",
    },
}
# As published (docs/method.md): what the method sets for itself wins over all of it.
PUBLISHED = {
    "stacking.rank": "4",
    "stacking.learning_rate": "5e-05",
    "stacking.epochs": "1",
    "fusion.merge": "factors",
}


@pytest.fixture
def both(workplace: Path) -> State:
    state = run(lamp_tasks=["LaMP-2M", "LaMP-3"], methods=METHODS, per_task=OWN)
    assert state.is_completed(), state.message
    return state


def steps(child: Run, section: str, items: int) -> int:
    """Optimiser steps of one LoRA on so many items by what MLflow says of its training."""
    told = {key: child.data.params[f"{section}.{key}"] for key in ("epochs", "batch_size")}
    batches = ceil(items / int(told["batch_size"]))
    return int(told["epochs"]) * ceil(batches / int(child.data.params[f"{section}.accumulation"]))


def test_mlflow_and_export_have_what_each_lamp_task_had(
    both: State, workplace: Path, mlflow_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, children = mlflow_runs(mlflow_file, both)
    methods = [child for child in children if child.data.tags["kind"] == "method"]
    assert len(methods) == 2 * len(METHODS)
    for child in methods:
        task, method = child.data.tags["lamp_task"], child.data.tags["method"]
        wanted = WANTED[task] | (PUBLISHED if method == "mta_published" else {})
        told = {name: child.data.params[name] for name in wanted}
        assert told == wanted, (task, method)
        section = "oppu" if method == "oppu" else "stacking"
        # Six items per few-shot user (split.few_shot_items).
        assert child.data.metrics["steps_per_user"] == steps(child, section, 6)
    anchors = [child for child in children if child.data.tags["kind"] == "anchor"]
    assert {child.data.tags["lamp_task"] for child in anchors} == set(OWN)
    client = MlflowClient(mlflow_file)
    for child in anchors:
        wanted = WANTED[child.data.tags["lamp_task"]]
        for name in ("meta_lora.rank", "meta_lora.epochs"):
            assert child.data.params[name] == wanted[name]
        made = client.download_artifacts(child.info.run_id, "adapter", str(workplace))
        about = json.loads((Path(made) / "adapter_config.json").read_text())
        assert str(about["r"]) == child.data.params["meta_lora.rank"]
        items = int(child.data.metrics["items"])
        assert child.data.metrics["steps"] == steps(child, "meta_lora", items)
    answered = {}
    for child in methods:
        if child.data.tags["method"] == "mta":
            file = client.download_artifacts(
                child.info.run_id, "predictions.parquet", str(workplace)
            )
            answered[child.data.tags["lamp_task"]] = pl.read_parquet(file)
    _exports(workplace, answered, capsys)


def _exports(
    workplace: Path, answered: dict[str, pl.DataFrame], capsys: pytest.CaptureFixture[str]
) -> None:
    """The exported LoRA has the rank of its LaMP task's merge, and stock PEFT answers as the run.

    Factor by factor: the anchors' 3 and the stacked 1. Exact: two anchors of 2, and the stacked 2.
    """
    for task, rank in (("LaMP-2M", 4), ("LaMP-3", 6)):
        cell = read_run().cell(task, 0)
        assert cell is not None
        user = pl.read_parquet(store().path(cell.users.few_shot)).to_dicts()[0]
        to = workplace / f"lora-{task}"
        assert (
            main(["export", "--user", user["user_id"], "--to", str(to), "--lamp-task", task]) == 0
        )
        base = Path(capsys.readouterr().out.strip().rpartition("its base model is ")[2])
        assert json.loads((to / "adapter_config.json").read_text())["r"] == rank
        prompt = json.loads((to / "mta.json").read_text())["prompt"]
        texts = [question_text(query["input"], get_task(task)) for query in user["query"]]
        prompts = [prompt.replace("<text>", " ".join(text.split())) for text in texts]
        told = dict(answered[task].select("query_id", "prediction").iter_rows())
        wanted = [told[query["id"]] for query in user["query"]]
        most = get_task(task).max_new_tokens
        assert stock_answers(base.parent, to, prompts, most) == wanted

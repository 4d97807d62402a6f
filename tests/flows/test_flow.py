"""The flow `mta` against a real Prefect server and a real MLflow."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from prefect import State
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
)

from flows.mta import mta
from tasks.config.run import resolve
from tests.flows.conftest import folders
from tests.small import SMALL

TABLE = Path(".mta/last_comparison.txt")


def run(**given: Any) -> State[Any]:
    """The flow on the small world, with sections laid over it."""
    sections = SMALL | {key: value for key, value in given.items() if not isinstance(value, dict)}
    for key, value in given.items():
        if isinstance(value, dict):
            sections = sections | {key: {**SMALL.get(key, {}), **value}}
    return mta(**sections, return_state=True)


def task_runs(state: State[Any]) -> list[tuple[str, str]]:
    """Name and state name of every task run of a flow run that has come to its end."""
    flow_run = state.state_details.flow_run_id
    assert flow_run is not None
    own = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run]))
    with get_client(sync_client=True) as client:
        # Task states reach the server as events, some after the flow has ended; `overall` is last.
        for _ in range(3000):
            runs = client.read_task_runs(flow_run_filter=own, limit=200)
            over = {item.name for item in runs if item.state and item.state.is_final()}
            if "overall" in over and len(over) == len({item.name for item in runs}):
                break
            time.sleep(0.1)
        assert "overall" in over
    return [(item.name.replace(", LaMP-2M", ""), item.state_name or "") for item in runs]


def made(state: State[Any]) -> set[str]:
    """The task runs that did work instead of finding it."""
    return {name for name, end in task_runs(state) if end != "Cached"}


def mlflow_runs(address: str, state: State[Any]) -> tuple[Run, list[Run]]:
    """The parent run of a flow run, and its children."""
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("mta")
    assert experiment is not None
    ids = [experiment.experiment_id]
    flow_run = str(state.state_details.flow_run_id)
    (parent,) = client.search_runs(ids, f"tags.prefect_flow_run = '{flow_run}'")
    children = client.search_runs(ids, f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    return parent, children


def test_whole_run_then_cached_then_changed(workplace: Path, mlflow_server: str) -> None:
    first = run()
    assert first.is_completed(), first.message
    table = (workplace / TABLE).read_text()
    heads = ("lamp_task", "---", "note")
    rows = [line.split() for line in table.splitlines() if line and not line.startswith(heads)]
    known = ["nonpersonal", "bayes", "oracle"]
    assert [row[1] for row in rows[:6]] == ["base", "merge_only", "mta", *known]
    assert [row[3] for row in rows[6:]] == [row[1] for row in rows[:6]]  # "mean of 1"

    # What the LoRAs are on is said beside the numbers: of one layer its seven linear ones.
    page = (workplace / ".mta" / "report.html").read_text(encoding="utf-8")
    for shown in (table, page):
        assert "meta_lora, stacking: a LoRA on 7 of 7 linear layers, " in shown

    parent, children = mlflow_runs(mlflow_server, first)
    kinds = sorted(child.data.tags["kind"] for child in children)
    assert kinds == ["anchor"] * 3 + ["method"] * 3
    assert parent.info.status == "FINISHED"
    client = MlflowClient(mlflow_server)
    names = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"config.json", "comparison.txt", "comparison.csv", "LaMP-2M"} <= names
    files = {item.path for item in client.list_artifacts(parent.info.run_id, "LaMP-2M")}
    # The bank that merge_only and mta share goes by the first of them.
    expected = {"merge_only", "data_counts.json", "manifest.json"}
    assert {f"LaMP-2M/{name}" for name in expected} == files
    bank = client.list_artifacts(parent.info.run_id, "LaMP-2M/merge_only")
    assert {Path(item.path).name for item in bank} == {
        "map.png",
        "recipes.parquet",
        "anchors.parquet",
    }
    # Of the parent the means alone; each method's run has its own. Accuracy is LaMP-2M's score.
    assert {name.partition(".")[0] for name in parent.data.metrics} == {row[1] for row in rows[:6]}
    for name in ("mta", "merge_only"):
        own = next(c for c in children if c.data.tags.get("method") == name)
        assert parent.data.metrics[f"{name}.score"] == own.data.metrics["accuracy"]
    ran, came_out, ways = parent.data.tags["mlflow.note.content"].split("\n\n")
    assert ran == (
        "3 methods on LaMP-2M, seed 0, answered 15 queries of 5 groups of users: data synthetic, "
        "preset embedded, base model tiny."
    )
    assert came_out.startswith("On LaMP-2M ")
    assert "<" not in came_out
    assert f"/runs/{parent.info.run_id}/artifacts/report.html)" in ways
    saved = json.loads(
        Path(
            client.download_artifacts(parent.info.run_id, "config.json", str(workplace))
        ).read_text()
    )
    assert saved == resolve(SMALL).model_dump(mode="json")
    methods = {c.data.tags["method"]: c for c in children if c.data.tags["kind"] == "method"}
    # MLflow's compare page needs the same names in every run.
    assert len({frozenset(c.data.metrics) for c in methods.values()}) == 1
    assert len({frozenset(c.data.params) for c in methods.values()}) == 1
    for method, child in methods.items():
        folder = client.download_artifacts(child.info.run_id, "", str(workplace / method))
        frame = pl.read_parquet(Path(folder) / "predictions.parquet")
        # The logged accuracy is that of the logged predictions.
        right = sum(p.strip() == g for p, g in zip(frame["prediction"], frame["gold"], strict=True))
        assert child.data.metrics["accuracy"] == pytest.approx(right / 15)
        golds = json.loads((Path(folder) / "golds.json").read_text())
        assert golds["task"] == "LaMP_2"
        assert [item["id"] for item in golds["golds"]] == frame["query_id"].to_list()
    anchor = next(c for c in children if c.data.tags["kind"] == "anchor")
    history = client.get_metric_history(anchor.info.run_id, "loss")
    assert [point.step for point in history] == list(range(1, len(history) + 1))
    adapter = {item.path for item in client.list_artifacts(anchor.info.run_id, "adapter")}
    assert adapter == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}

    # Nothing changed: everything is found, and MLflow has a run as complete as the first.
    second = run()
    assert made(second) == set()
    again, children_again = mlflow_runs(mlflow_server, second)
    assert again.info.run_id != parent.info.run_id
    assert len(children_again) == len(children)
    # Each run keeps its report; a name goes to the newest.
    reports = sorted((workplace / ".mta" / "reports").glob("*.html"))
    assert len(reports) == 2
    assert (workplace / ".mta" / "report.html").resolve() in reports
    assert again.data.metrics == parent.data.metrics

    # A rank of the stacked LoRA: stacking and what it is scored by; what compares the methods only
    # if an answer changed.
    third = run(stacking={"rank": 3})
    assert made(third) - {"compare", "overall"} == {"answers, mta 0", "answers, mta 1"}

    # A damaged file, and a lost one: these jobs are done again, to the same numbers, so nothing
    # after them is.
    damaged, lost = folders(workplace, "meta_lora")[:2]
    names = [json.loads((one / "meta_lora.json").read_text())["anchor"] for one in (damaged, lost)]
    files = [one / "adapter" / "adapter_model.safetensors" for one in (damaged, lost)]
    good = [file.read_bytes() for file in files]
    files[0].write_bytes(good[0][:-1] + bytes([good[0][-1] ^ 1]))
    files[1].unlink()
    assert made(run()) == {f"meta-lora, anchor {name}" for name in names}
    assert [file.read_bytes() for file in files] == good


def test_a_failing_anchor_leaves_the_others(
    workplace: Path, mlflow_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.lora import grouped_engine

    real = grouped_engine.train_group
    calls: list[int] = []

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return real(*args, **kwargs)

    monkeypatch.setattr(grouped_engine, "train_group", sometimes)
    state = run()
    assert state.is_failed()
    assert state.name == "Incomplete"
    assert "out of luck" in (state.message or "")
    assert len(folders(workplace, "meta_lora")) == 2
    text = (workplace / TABLE).read_text()
    assert "MISSING: LaMP-2M: anchor " in text
    assert "out of luck" in text
    parent, children = mlflow_runs(mlflow_file, state)
    assert parent.info.status == "FAILED"
    assert parent.data.tags["missing"] == "1"
    # The methods were scored all the same, from the anchors there are.
    trained = {
        c.data.tags["method"]: c.data.params["anchors_trained"]
        for c in children
        if "method" in c.data.tags
    }
    assert trained == {"base": "0", "merge_only": "2", "mta": "2"}
    # Started again, only what is missing is trained.
    calls.clear()
    monkeypatch.setattr(grouped_engine, "train_group", real)
    assert run().is_completed()
    assert len(folders(workplace, "meta_lora")) == 3


def test_the_report_can_fail_without_losing_the_scores(
    workplace: Path, mlflow_tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no MLflow server, too: Prefect then says where the file is."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    # Where a run keeps it that is told of none; made there, tests/unit/test_databases.py sees.
    (workplace / ".mta" / "local").mkdir(parents=True)
    shutil.copy(mlflow_tables, workplace / ".mta" / "local" / "mlflow.db")
    state = run(methods=["base"])
    assert state.is_completed(), state.message
    report = workplace / ".mta" / "report.html"
    # One method and no bank: nothing was merged, and there is no map.
    assert "What merging chose" not in report.read_text(encoding="utf-8")
    with get_client(sync_client=True) as client:
        shown = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["report"]))
        )
    assert any(str(report.resolve()) in str(one.data) for one in shown)

    def broken(_data: Any) -> str:
        raise ValueError("no ink")

    monkeypatch.setattr("tasks.report.publish.report_html", broken)
    report.unlink()
    state = run(methods=["base"])
    assert state.name == "Incomplete"
    assert "the report was not made (ValueError: no ink)" in (state.message or "")
    table = (workplace / TABLE).read_text()
    assert "MISSING: the report" in table
    assert any(line.split()[:2] == ["LaMP-2M", "base"] for line in table.splitlines())
    assert not report.exists()

"""`mta forget`: a user out of a store that the pipeline filled, MLflow and what lies beside."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pytest
from mlflow import MlflowClient
from prefect import flow

from tasks.report.files import write_report, write_run, write_state
from tasks.results.run import Cell, Run
from tasks.results.store import RESULTS, Store, remembered, store
from tasks.running.slots import gpu_slots
from tasks.tools.main import main
from tasks.tracking.registry import register
from tasks.tracking.server import Mlflow
from tests.unit.stages import pipeline
from tests.unit.stages.users import user, write_users

pytestmark = [pytest.mark.slow, pytest.mark.server]

# Names of which one is the beginning of another, and one that looks like a path. In this order
# they are answered for in two batches: ../../x and few-1, few-12.
ROLES = pipeline.ROLES | {
    "few_shot": [user("few-1", 4, queries=2), user("few-12", 4, queries=2), user("../../x", 4, 2)]
}
OPTIONS = {
    "methods": ["base", "mta"],
    "stacking": pipeline.OPTIONS["stacking"] | {"users_per_job": 2},
}
TRACKED = "mlflow.db"
RUN_ID = "0b5a1c9e-5a55-4b1b-9d55-2b0d7a2f0f10"


@flow(persist_result=False)
def ran(place: Path, roles: dict[str, Any]) -> None:
    """The stages in a flow, so that Prefect keeps their results."""
    gpu_slots()
    CELLS.append(pipeline.run(place, roles, **OPTIONS))


CELLS: list[Cell] = []


@pytest.fixture(scope="module")
def filled(
    tmp_path_factory: pytest.TempPathFactory, prefect_server: None
) -> Iterator[tuple[Path, Run]]:
    """A folder with a store, a run's file, a report and a log."""
    with pipeline.prepared_place(tmp_path_factory.mktemp("forget")) as place:
        ran(place, ROLES)
        # Another LaMP data set of other people in the same store.
        others = {
            role: [
                user(f"{one['user_id']}z", len(one["profile"]), len(one["query"])) for one in listed
            ]
            for role, listed in ROLES.items()
        }
        elsewhere = place / "elsewhere"
        elsewhere.mkdir()
        shutil.copytree(place / "model", elsewhere / "model")
        ran(elsewhere, others)
        run = Run(id=RUN_ID, name="one", date="", report="one", config={}, cells=(CELLS[0],))
        write_run(run)
        write_report("one", "last_comparison.txt", "mta 0.5\n")
        write_report("two", "report.html", "<p>few-1 and few-12</p>")
        write_state("reports/three.html", "<p>few-12</p>")
        remembered("users", "one", lambda: {"few-1": "0" * 64})
        remembered("users", "other", lambda: {"few-12": "0" * 64})
        logs = store().state / "logs"
        logs.mkdir()
        (logs / "worker.log").write_text("trained few-1, few-12 and anchor-3\n")
        yield place, run


@pytest.fixture
def copied(
    filled: tuple[Path, Run], tmp_path: Path, mlflow_tables: Path, monkeypatch: pytest.MonkeyPatch
) -> Store:
    """All of it, and the run in an MLflow."""
    place, run = filled
    shutil.copy(mlflow_tables, tmp_path / TRACKED)
    shutil.copytree(place / "mta", tmp_path / "mta", symlinks=True)
    monkeypatch.chdir(tmp_path)  # where no `mta run` has a database
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "mta" / "store"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / TRACKED}")
    _track(tmp_path, run.cells[0])
    return store()


def _track(folder: Path, cell: Cell) -> None:
    """As tasks/tracking logs: tables of the parent, a method's answers, an anchor's adapter."""
    client = MlflowClient(f"sqlite:///{folder / TRACKED}")
    experiment = client.create_experiment("mta", (folder / "artifacts").as_uri())
    tags = {"kind": "benchmark", "prefect_flow_run": RUN_ID}
    parent = client.create_run(experiment, tags=tags).info.run_id
    merging = cell.mergings[0]
    client.log_artifact(parent, str(store().path(merging.merged.recipes.table)))
    client.log_text(parent, "nothing personal", "comparison.txt")
    client.log_text(parent, "picture", "map.png")
    below = {"mlflow.parentRunId": parent}
    for scored in cell.compared.scored:
        tags = {"kind": "method", "method": scored.method, **below}
        run = client.create_run(experiment, tags=tags).info.run_id
        client.log_metric(run, "accuracy", 0.5)
        for file in (scored.predictions, scored.golds):
            client.log_artifact(run, str(store().path(file)))
    for lora in merging.merged.bank.members:
        tags = {"kind": "anchor", "anchor": lora.anchor, **below}
        run = client.create_run(experiment, run_name=f"LaMP-2M anchor {lora.anchor}", tags=tags)
        client.log_artifacts(run.info.run_id, str(store().path(lora.adapter)), "adapter")


def registered(folder: Path, run: Run) -> MlflowClient:
    """The run's bank in MLflow's registry."""
    mlflow = Mlflow(f"sqlite:///{folder / TRACKED}")
    (parent,) = mlflow.search("tags.kind = 'benchmark'")
    register(mlflow, parent.info.run_id, run)
    return mlflow.client


def grep(folder: Path, *words: str) -> list[str]:
    """Files with any of the words in their bytes, parquet read as JSON: a search of its own."""
    found = []
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix not in (".db", ".sqlite"):
            text = file.read_bytes()
            if file.suffix == ".parquet":
                text += pl.read_parquet(file).write_json().encode()
            text = text.replace(b'\\"', b'"')  # JSON in JSON
            found += [f"{file}: {word}" for word in words if word.encode() in text]
    return found


def stages_at(root: Path) -> Counter[str]:
    """How many folders there are of each stage."""
    places = (place for place in Store(root).folders() if any(place.iterdir()))
    return Counter(place.parent.parent.name for place in places)


def artifacts(folder: Path) -> list[str]:
    return sorted(f.name for f in (folder / "artifacts").rglob("*") if f.is_file())


def test_a_few_shot_user_is_gone_and_others_are_not(
    copied: Store, tmp_path: Path, filled: tuple[Path, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    before = stages_at(copied.root)
    banks = registered(tmp_path, filled[1])
    assert grep(tmp_path / "mta", '"few-1"', "few-1 film")
    assert main(["forget", "few-1", "--data", str(tmp_path.parent / "nowhere")]) == 2
    data = write_users(tmp_path / "data", **ROLES)
    capsys.readouterr()
    # The flow run that the run's file names is on no server.
    assert main(["forget", "few-1", "--data", str(data)]) == 1
    said = capsys.readouterr()
    (left,) = [line for line in said.err.splitlines() if "still waiting for" not in line]
    assert left.startswith(f"mta: LEFT: Prefect: `prefect flow-run delete {RUN_ID}` where")
    assert f"{data / 'user_few_shot.json'}" in said.out or f"{data}: still holds" in said.out
    assert grep(tmp_path / "mta", '"few-1"', "few-1 film") == []
    assert grep(tmp_path / "artifacts", '"few-1"', "few-1 film") == []
    # few-12 is another: its name stays in the log, in which few-1 is crossed out.
    log = (tmp_path / "mta" / "logs" / "worker.log").read_text()
    assert log == "trained xxxxx, few-12 and anchor-3\n"
    assert not list((tmp_path / "mta" / "runs").iterdir())
    # What the user's run showed, and what names the user; the newest is no link to nothing.
    reports = tmp_path / "mta" / "reports"
    assert [file.name for file in reports.iterdir()] == ["three.html"]
    for newest in ("report.html", "last_comparison.txt"):
        assert not (tmp_path / "mta" / newest).is_symlink()
    after = stages_at(copied.root)
    # Nothing of the bank was trained on the user.
    assert len(banks.search_model_versions("name = 'mta-bank'")) == 1
    # Nobody was trained on the user: all anchors' LoRAs stay, and so do the other people's folders.
    assert after["meta_lora"] == before["meta_lora"] == 6
    for stage in ("prepare", "embed", "whitening", "anchors", "bank", "fusion", "compare"):
        assert (before[stage], after[stage]) == (2, 1), stage
    # Of two batches of each data set the one with the user, of each of two methods.
    assert (before["stacking"], after["stacking"]) == (4, 3)
    assert (before["answers"], after["answers"]) == (8, 6)
    assert before["tokens"] > after["tokens"] == 0
    memo = [file.read_text() for file in (copied.root / "memo").glob("users-*")]
    assert memo == [json.dumps({"few-12": "0" * 64})]
    left = artifacts(tmp_path)
    assert "predictions.parquet" not in left
    assert "golds.json" not in left
    assert "map.png" not in left
    assert "comparison.txt" in left
    assert left.count("adapter_model.safetensors") == 3
    client = MlflowClient(f"sqlite:///{tmp_path / TRACKED}")
    runs = client.search_runs(["1"], "tags.kind = 'method'")
    assert {run.data.metrics["accuracy"] for run in runs} == {0.5}


def test_an_anchors_lora_goes_with_all_that_was_made_of_it(
    copied: Store, tmp_path: Path, filled: tuple[Path, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    before = stages_at(copied.root)
    banks = registered(tmp_path, filled[1])
    # Its predictions hold nothing of the anchor, but were made with what it taught.
    assert artifacts(tmp_path).count("predictions.parquet") == 2
    assert main(["forget", "anchor-3"]) == 1
    said = capsys.readouterr().out
    assert "trained on the user, so removed and trained again: anchor anchor-3\n" in said
    assert grep(tmp_path, '"anchor-3"', "anchor-3 film") == []
    after = stages_at(copied.root)
    assert after["meta_lora"] == before["meta_lora"] - 1
    for stage in ("bank", "fusion"):
        assert (before[stage], after[stage]) == (2, 1), stage
    # The answers of the bare base model stay.
    assert (before["stacking"], after["stacking"]) == (4, 2)
    assert (before["answers"], after["answers"]) == (8, 6)
    assert artifacts(tmp_path).count("predictions.parquet") == 0
    client = MlflowClient(f"sqlite:///{tmp_path / TRACKED}")
    anchors = [r.data.tags["anchor"] for r in client.search_runs(["1"], "tags.kind = 'anchor'")]
    assert sorted(anchors) == ["anchor-1", "anchor-2"]
    assert banks.search_model_versions("name = 'mta-bank'") == []
    assert not [*(tmp_path / "artifacts").rglob("bank.safetensors")]


def test_the_next_run_makes_the_same_for_the_others(
    copied: Store, filled: tuple[Path, Run], tmp_path: Path
) -> None:
    """Without the user in the data: other users' LoRAs are found, not trained again."""
    place, run = filled
    assert main(["forget", "few-12"]) == 1
    work = tmp_path / "again"
    work.mkdir()
    shutil.copytree(place / "model", work / "model")
    less = ROLES | {"few_shot": [one for one in ROLES["few_shot"] if one["user_id"] != "few-12"]}
    ran(work, less)
    again, before = CELLS[-1], run.cells[0]
    assert again.users.few_shot_ids == ("../../x", "few-1")
    # A folder holds the seconds of its training: none was trained again.
    assert again.mergings[0].merged.bank.members == before.mergings[0].merged.bank.members
    assert again.answers["mta"][0].stacked == before.answers["mta"][0].stacked


def test_a_name_like_a_path_is_a_name(copied: Store, tmp_path: Path) -> None:
    outside = tmp_path / "x"
    outside.write_text("kept")
    assert main(["forget", "../../x"]) == 1
    assert outside.read_text() == "kept"
    assert grep(tmp_path / "mta", '"../../x"') == []


def test_whom_nobody_knows(copied: Store, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(copied.root.rglob("*"))
    for name in ("few-", "nobody", "few-1 film number 1"):
        assert main(["forget", name]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"mta: {name}: no such user")
        assert said.count("\n") == 1
    assert sorted(copied.root.rglob("*")) == before


def test_a_second_call_finds_only_the_source(
    copied: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["forget", "few-1"]) == 1
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["forget", "few-1"]) == 2  # the run that knew the source is gone, too
    assert "no such user" in capsys.readouterr().err
    data = write_users(tmp_path / "data", **ROLES)
    assert main(["forget", "few-1", "--data", str(data)]) == 0
    said = capsys.readouterr().out
    assert f"{data}: still holds the user" in said
    assert "nothing of the user is left" in said
    assert next(path for path in sorted(tmp_path.rglob("*")) if path not in before) == data


def test_what_cannot_be_reached_is_said(
    copied: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(["forget", "few-1"]) == 1
    said = capsys.readouterr()
    assert "LEFT: MLflow at http://***@127.0.0.1:9: not searched" in said.err
    assert "secret" not in said.out + said.err
    assert "nothing of the user is left" not in said.out


def test_out_of_a_store_at_a_url(
    copied: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the storage, also what only another machine made, and from the cache here."""
    url = f"memory://{tmp_path.name}/there"
    monkeypatch.setenv("MTA_STORE", url)
    monkeypatch.setenv("MTA_STORE_CACHE", str(tmp_path / "mta" / "cache"))
    here = store()
    assert here.remote
    for place in (*copied.folders(), copied.root / RESULTS):
        here.remote.upload(place, place.relative_to(copied.root).as_posix())
    here.intact(CELLS[0].users.few_shot)
    # As an earlier call left it: since then another machine made it again, of other folders.
    stale = next((copied.root / RESULTS).glob("compare-*"))
    (here.root / RESULTS).mkdir()
    (here.root / RESULTS / stale.name).write_text("{}")
    before = stages_at(copied.root)
    shutil.rmtree(copied.root)
    assert main(["forget", "few-1"]) == 1
    assert "1 left" in capsys.readouterr().out  # in Prefect
    files = fsspec.filesystem("memory")
    there = tmp_path / "there"
    files.get(f"/{tmp_path.name}/there", str(there), recursive=True)
    assert grep(there, '"few-1"', "few-1 film") == []
    assert grep(tmp_path / "mta", '"few-1"', "few-1 film") == []
    after = stages_at(there)
    assert after["meta_lora"] == before["meta_lora"]
    assert (before["stacking"], after["stacking"]) == (4, 3)
    kept = [file.read_bytes() for file in (there / RESULTS).iterdir()]
    assert kept
    assert b"{}" not in kept

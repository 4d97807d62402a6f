"""`tasks.forget`: a user out of a store that the pipeline filled, MLflow and what lies beside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tasks.errors import InputError
from tasks.forget.__main__ import main
from tasks.forget.user import forget
from tasks.report.files import write_report, write_run, write_state
from tasks.report.since import since
from tasks.stage import store
from tasks.store.artifacts import Store
from tasks.store.remote import RemoteStore
from tasks.store.storage import Storage
from tests.unit.stages import pipeline
from tests.unit.stages.users import user, write_users

# Names of which one is the beginning of another, and one that looks like a path.
ROLES = pipeline.ROLES | {
    "few_shot": [user("few-1", 4, queries=2), user("few-12", 4, queries=2), user("../../x", 4, 2)]
}
TRACKED = "mlflow.db"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder with a store, a run's file, a report, a log, and the run in MLflow."""
    with pipeline.prepared_place(tmp_path_factory.mktemp("forget")) as place:
        done = pipeline.run(place, ROLES)
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
        pipeline.run(elsewhere, others)
        done["task_adapt"] = None
        assert since(store(), done["config"], [done]) is None
        write_run("one", done["config"], [done], {"name": "one", "date": "", "report": "one"})
        write_report("one", "last_comparison.txt", "mta 0.5\n")
        write_report("two", "report.html", "<p>few-1 and few-12</p>")
        write_state("reports/three.html", "<p>few-12</p>")
        logs = store().root.parent / "logs"
        logs.mkdir()
        (logs / "worker.log").write_text("trained few-1, few-12 and anchor-3\n")
        yield place, done


@pytest.fixture
def copied(
    filled: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Store:
    place, done = filled
    shutil.copytree(place / "mta", tmp_path / "mta")
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "mta" / "store"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / TRACKED}")
    _track(tmp_path, store(), done)
    return store()


def _track(folder: Path, where: Store, done: dict[str, Any]) -> None:
    """As tasks/tracking logs: tables of the parent, a method's answers, an anchor's adapter."""
    client = MlflowClient(f"sqlite:///{folder / TRACKED}")
    experiment = client.create_experiment("mta", (folder / "artifacts").as_uri())
    parent = client.create_run(experiment, tags={"kind": "benchmark"}).info.run_id
    client.log_artifact(parent, str(where.open(done["fusion"]["ref"]).folder / "recipes.parquet"))
    client.log_text(parent, "nothing personal", "comparison.txt")
    client.log_text(parent, "picture", "map.png")
    for method, scored in done["scores"].items():
        tags = {"kind": "method", "result": scored["ref"]["uri"], "method": method}
        run = client.create_run(experiment, tags=tags).info.run_id
        client.log_metric(run, "accuracy", 0.5)
        for file in ("predictions.parquet", "golds.json"):
            client.log_artifact(run, str(where.open(scored["ref"]).folder / file))
    for record in sorted(where.root.glob("meta_lora/*/*/record.json")):
        told = json.loads(record.read_text())
        anchor = told["value"]["anchor"]
        tags = {"kind": "anchor", "anchor": anchor, "result": f"meta_lora/{record.parent.name}"}
        run = client.create_run(experiment, run_name=f"LaMP-2M anchor {anchor}", tags=tags)
        client.log_artifacts(run.info.run_id, str(record.parent / "adapter"), "adapter")


def grep(folder: Path, *words: str) -> list[str]:
    """Files with any of the words in their bytes, parquet read as JSON: a search of its own."""
    import polars as pl

    found = []
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix != ".db":
            text = file.read_bytes()
            if file.suffix == ".parquet":
                text += pl.read_parquet(file).write_json().encode()
            found += [f"{file}: {word}" for word in words if word.encode() in text]
    return found


def stages(where: Store) -> dict[str, int]:
    return stages_at(where.root)


def stages_at(folder: Path) -> dict[str, int]:
    return {f.name: len(list(f.glob("*/*/record.json"))) for f in folder.iterdir()}


def fetched(storage: Storage, folder: Path) -> Path:
    """All that a storage has, as files in `folder`."""
    for path in storage.files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        assert storage.download(path, folder / path)
    return folder


def artifacts(folder: Path) -> list[str]:
    return sorted(f.name for f in (folder / "artifacts").rglob("*") if f.is_file())


def test_a_few_shot_user_is_gone_and_others_are_not(
    copied: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stages(copied)
    assert grep(tmp_path / "mta", '"few-1"', "few-1 film")
    assert main(["few-1"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "nothing of the user is left" in said.out
    assert "still holds the user" in said.out  # the file it came from is the user's own affair
    assert grep(tmp_path, '"few-1"', "few-1 film") == []
    # few-12 is another: its name stays in the log, in which few-1 is crossed out.
    log = (tmp_path / "mta" / "logs" / "worker.log").read_text()
    assert log == "trained xxxxx, few-12 and anchor-3\n"
    assert not list((tmp_path / "mta" / "runs").iterdir())
    # What the user's run showed, and what names the user; the newest is no link to nothing.
    reports = tmp_path / "mta" / "reports"
    assert [file.name for file in reports.iterdir()] == ["three.html"]
    for newest in ("report.html", "last_comparison.txt"):
        assert not (tmp_path / "mta" / newest).is_symlink()
    after = stages(copied)
    # Nobody was trained on the user: anchors and bank stay, and so do the other people's pieces.
    for stage in ("meta_lora", "bank", "base_model"):
        assert after[stage] == before[stage]
    for stage in ("prepare", "embedding", "anchors", "fusion", "stacking"):
        assert (before[stage], after[stage]) == (2, 1), stage
    assert (before["fingerprints"], after["fingerprints"]) == (1, 0)
    left = artifacts(tmp_path)
    assert "predictions.parquet" not in left
    assert "golds.json" not in left
    assert "map.png" not in left
    assert "comparison.txt" in left
    assert left.count("adapter_model.safetensors") == before["meta_lora"]
    client = MlflowClient(f"sqlite:///{tmp_path / TRACKED}")
    runs = client.search_runs(["1"], "tags.kind = 'method'")
    assert {run.data.metrics["accuracy"] for run in runs} == {0.5}


def test_an_anchors_lora_goes_with_all_that_was_made_of_it(
    copied: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stages(copied)
    assert main(["anchor-3"]) == 0
    said = capsys.readouterr().out
    assert "trained on the user: anchors anchor-3; they are removed, and trained again" in said
    assert grep(tmp_path, '"anchor-3"', "anchor-3 film") == []
    after = stages(copied)
    assert after["meta_lora"] == before["meta_lora"] - 1
    for stage in ("bank", "fusion", "stacking"):
        assert (before[stage], after[stage]) == (2, 1), stage
    assert after["predictions"] < before["predictions"]
    client = MlflowClient(f"sqlite:///{tmp_path / TRACKED}")
    anchors = [r.data.tags["anchor"] for r in client.search_runs(["1"], "tags.kind = 'anchor'")]
    assert len(anchors) == before["meta_lora"] - 1
    assert "anchor-3" not in anchors


def test_the_next_run_makes_the_same_for_the_others(
    copied: Store, filled: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Without the user in the data: other anchors' LoRAs are found, not trained again."""
    place, _ = filled
    assert main(["few-12"]) == 0
    work = tmp_path / "again"
    work.mkdir()
    shutil.copytree(place / "model", work / "model")
    less = ROLES | {"few_shot": [one for one in ROLES["few_shot"] if one["user_id"] != "few-12"]}
    done = pipeline.run(work, less)
    assert set(done["states"]["meta_lora"]) == {"Cached"}
    assert done["prepared"]["value"]["few_shot"] == ["../../x", "few-1"]


def test_a_name_like_a_path_is_a_name(copied: Store, tmp_path: Path) -> None:
    outside = tmp_path / "x"
    outside.write_text("kept")
    assert main(["../../x"]) == 0
    assert outside.read_text() == "kept"
    assert grep(tmp_path / "mta", '"../../x"') == []


def test_whom_nobody_knows(copied: Store, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(copied.root.rglob("*"))
    for name in ("few-", "nobody", "few-1 film number 1"):
        assert main([name]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"mta: {name}: no such user")
        assert said.count("\n") == 1
    assert sorted(copied.root.rglob("*")) == before


def test_a_second_call_finds_only_the_source(
    copied: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["few-1"]) == 0
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["few-1"]) == 2  # the run that knew the source is gone, too
    assert "no such user" in capsys.readouterr().err
    data = write_users(tmp_path / "data", **ROLES)
    assert main(["few-1", "--data", str(data)]) == 0
    assert f"{data}: still holds the user" in capsys.readouterr().out
    assert next(path for path in sorted(tmp_path.rglob("*")) if path not in before) == data


def test_a_call_that_was_cut_off_is_made_again(
    copied: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What tells whose texts they are is removed last, so that a second call knows them."""
    removed: list[Path] = []
    really = shutil.rmtree

    def fails(folder: Path, *given: Any, **options: Any) -> None:
        if len(removed) == 3 and folder.is_relative_to(copied.root):
            raise KeyboardInterrupt
        removed.append(folder)
        really(folder, *given, **options)

    monkeypatch.setattr(shutil, "rmtree", fails)
    with pytest.raises(KeyboardInterrupt):
        main(["few-1"])
    monkeypatch.setattr(shutil, "rmtree", really)
    assert main(["few-1"]) == 0
    assert grep(tmp_path, '"few-1"', "few-1 film") == []


def test_what_cannot_be_reached_is_said(
    copied: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(["few-1"]) == 1
    said = capsys.readouterr()
    assert "LEFT: MLflow at http://***@127.0.0.1:9: not searched" in said.err
    assert "secret" not in said.out + said.err
    assert "nothing of the user is left" not in said.out


def test_a_run_under_way_is_waited_for(copied: Store) -> None:
    place = copied.root / "stacking" / "ab" / ".making-elsewhere~1~1~x"
    place.mkdir(parents=True)
    with pytest.raises(InputError, match="is being made by a run"):
        forget(copied, "few-1")


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
    other = RemoteStore(Storage(url), tmp_path / "other" / "cache")
    for record in sorted(copied.root.glob("*/*/*/record.json")):
        source = record.parent

        def make(out: Path, source: Path = source) -> dict[str, Any]:
            shutil.copytree(source, out, dirs_exist_ok=True)
            (out / "record.json").unlink()
            told = json.loads((source / "record.json").read_text())
            return dict(told["value"]) | {"notes": told["notes"]}

        other.make(source.parent.parent.name, source.name, make)
    here = store()
    assert isinstance(here, RemoteStore)
    here.find("prepare", sorted((copied.root / "prepare").glob("*/*"))[0].name)
    here.find_rows("stacking", ["nobody"])
    Storage(url).write(".claims/bank/elsewhere~1~1~x", b"{}")
    with pytest.raises(InputError, match=f"^store: {url}/.claims/bank/elsewhere~1~1~x is being"):
        forget(here, "few-1")
    Storage(url).remove(".claims/bank/elsewhere~1~1~x")
    shutil.rmtree(copied.root)
    there = fetched(Storage(url), tmp_path / "there before")
    before = stages_at(there)
    assert grep(there, '"few-1"', "few-1 film")
    assert main(["few-1"]) == 0
    assert "nothing of the user is left" in capsys.readouterr().out
    there = fetched(Storage(url), tmp_path / "there after")
    assert grep(there, '"few-1"', "few-1 film") == []
    assert grep(tmp_path / "mta", '"few-1"', "few-1 film") == []
    after = stages_at(there)
    assert after["meta_lora"] == before["meta_lora"]
    assert (before["stacking"], after["stacking"]) == (2, 1)
    # The other machine's cache still has the user, until its next run.
    assert grep(tmp_path / "other", '"few-1"')
    other.sweep()
    assert grep(tmp_path / "other", '"few-1"', "few-1 film") == []

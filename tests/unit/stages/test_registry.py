"""The bank of a run in MLflow's model registry, and new users by it, from another machine too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from tasks.errors import InputError
from tasks.export import Finished
from tasks.personalise.ask import ask
from tasks.personalise.new_users import personalise
from tasks.results.run import Run
from tasks.results.store import store
from tasks.tools.main import main
from tasks.tracking import taken_run
from tasks.tracking.registry import register
from tasks.tracking.server import Mlflow
from tasks.tracking.taken_run import run_of
from tests.unit.stages import pipeline
from tests.unit.stages.test_personalise import NEW, saved

BANK = "models:/mta-bank@LaMP-2M"
# All that a version may hold: a tiny base model, adapted to the task, and whitened signatures.
RICH: dict[str, Any] = {
    "base": {
        "model": "tiny",
        "tiny": {"hidden": 16, "layers": 1, "heads": 2, "steps": 20, "batch_size": 8},
        "task_adapt": {"enabled": True, "train_on": "profile", "rank": 2, "epochs": 1},
    },
    "anchors": pipeline.OPTIONS["anchors"] | {"embedding": "input_signature"},
    "fusion": {"top_m": 2, "weights": "evidence"},
}


@pytest.fixture(scope="module")
def finished(place: Path) -> Run:
    return saved(pipeline.run(place, pipeline.ROLES, **RICH), "rich")


@pytest.fixture(scope="module")
def server(place: Path, finished: Run) -> Iterator[Mlflow]:
    """An MLflow in a file, which has the run's bank."""
    uri = f"sqlite:///{place / 'mlflow.db'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)
        found = Mlflow(uri)
        register(found, found.client.create_run(found.experiment).info.run_id, finished)
        yield found
        mlflow.set_tracking_uri(None)


@pytest.fixture
def elsewhere(server: Mlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another machine: only MLflow is in reach."""
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "mta" / "store"))
    return tmp_path


@pytest.fixture(scope="module")
def recipes(finished: Run, place: Path) -> dict[str, Any]:
    """What the run itself gives the new users."""
    file = place / "new.json"
    file.write_text(json.dumps(NEW))
    assert len([*personalise(Finished(finished), file, place / "own", keep="recipe")]) == len(NEW)
    return {path.stem: json.loads(path.read_text()) for path in (place / "own").iterdir()}


def test_a_version_says_what_it_is(server: Mlflow, finished: Run) -> None:
    client = server.client
    (one,) = client.search_model_versions("name = 'mta-bank'")
    assert (one.status, one.version) == ("READY", 1)
    told = {"run": "rich", "lamp_task": "LaMP-2M", "seed": "0", "base": "tiny", "method": "mta"}
    assert told.items() <= one.tags.items()
    assert client.get_run(one.run_id).data.tags["mta-bank.LaMP-2M"] == "models:/mta-bank/1"
    model = client.get_logged_model(one.tags["model_id"])
    assert model.params["fusion.top_m"] == "2"
    info = mlflow.models.get_model_info(BANK)
    assert info.metadata["prompt"].startswith("description: <text>")
    assert info.metadata["fields"] == ["description", "tag"]
    assert info.signature.inputs.input_names() == ["user_id", "profile"]
    folder = Path(mlflow.artifacts.download_artifacts(BANK))
    assert not [*folder.rglob("*.pkl")]
    text = (folder / "artifacts" / "bank" / "run.json").read_text()
    assert "few-0" not in text
    assert "anchor-1" in text


def test_a_bank_is_registered_once(server: Mlflow, finished: Run) -> None:
    """By its content: a run that found it, also under another name, gets the same version."""
    client = server.client
    later = client.create_run(server.experiment).info.run_id
    register(server, later, finished.model_copy(update={"name": "later", "id": "later"}))
    assert len(client.search_model_versions("name = 'mta-bank'")) == 1
    assert client.get_run(later).data.tags["mta-bank.LaMP-2M"] == "models:/mta-bank/1"


def test_from_another_machine(elsewhere: Path, recipes: dict[str, Any], place: Path) -> None:
    """By alias: the run's own recipes, and the very LoRAs."""
    to, given = elsewhere / "to", ["--run", BANK, "--user", str(place / "new.json"), "--to"]
    assert main(["personalise", *given, str(to), "--keep", "recipe"]) == 0
    assert {path.stem: json.loads(path.read_text()) for path in to.iterdir()} == recipes
    assert main(["personalise", *given, str(elsewhere / "folders")]) == 0
    assert len([*store().root.glob("bank/*/*/bank.safetensors")]) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTA_STORE", str(place / "mta" / "store"))
        assert main(["personalise", "--run", "rich", *given[2:], str(elsewhere / "own")]) == 0
    for name in recipes:
        own = (elsewhere / "own" / name / "adapter_model.safetensors").read_bytes()
        made = (elsewhere / "folders" / name / "adapter_model.safetensors").read_bytes()
        assert made == own


def test_asking_from_another_machine(
    elsewhere: Path, finished: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the run itself answers."""
    file = elsewhere / "one.json"
    file.write_text(json.dumps(NEW[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTA_STORE", str(place / "mta" / "store"))
        wanted = ask(Finished(finished), str(file), "a film", compare=False)["stacked"]
    capsys.readouterr()
    assert main(["ask", "--run", BANK, "--user", str(file), "a film"]) == 0
    assert capsys.readouterr().out.strip() == wanted
    assert main(["ask", "--run", BANK, "--user", "few-0", "a film"]) == 2
    assert "few-0: no few-shot user of the run rich" in capsys.readouterr().err


def test_what_is_there_is_not_fetched(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    real = taken_run._download

    def download(files: Any, file: Any, scratch: Path) -> Path:
        fetched.append(file.uri.split("/")[0])
        return real(files, file, scratch)

    monkeypatch.setattr(taken_run, "_download", download)
    run = run_of("models:/mta-bank/1")
    assert sorted(fetched) == ["bank", "registered", "task_adapt", "tiny_model", "whitening"]
    run_of("models:/mta-bank/1")
    assert len(fetched) == 5
    (damaged,) = (store().root / "bank").glob("*/*/bank.safetensors")
    damaged.write_bytes(b"x")
    assert run_of("models:/mta-bank/1") == run
    assert fetched[5:] == ["bank"]


def test_as_mlflow_loads_it(elsewhere: Path, recipes: dict[str, Any]) -> None:
    """`predict` takes users of a user file; bad ones have a line, and nothing else is written."""
    bank = mlflow.pyfunc.load_model(BANK)
    users = [{name: one[name] for name in ("user_id", "profile")} for one in NEW]
    rows = bank.predict(users)
    wanted = [recipes[user["user_id"]] for user in users]
    assert rows == [
        {"user_id": one["user"], "anchors": one["anchors"], "weights": one["weights"]}
        for one in wanted
    ]
    foreign = {"user_id": "bad", "profile": [{"description": "x", "tag": "no tag"}]}
    nobody = {"user_id": "nobody", "profile": []}
    rows = bank.predict([foreign, nobody, users[0], users[0]])
    assert rows[0]["error"].startswith("user bad: none of 1 items can be used; each needs")
    assert rows[1] == {"user_id": "nobody", "anchors": [], "weights": []}
    assert rows[2]["anchors"] == wanted[0]["anchors"]
    assert rows[3]["error"] == "line 4 (user_id 'new-0') has the user_id of line 3; ids must differ"
    assert [*elsewhere.iterdir()] == []
    to = elsewhere / "models"
    bank = mlflow.pyfunc.load_model(BANK, model_config={"to": str(to)})
    (row,) = bank.predict(users[:1], params={"keep": "folder"})
    assert row == {"user_id": "new-0", "folder": str(to / "new-0")}
    assert (to / "new-0" / "adapter_model.safetensors").is_file()
    with pytest.raises(InputError, match=r"keep 'both': give one of folder, recipe"):
        bank.predict(users[:1], params={"keep": "both"})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("models:/mta-bank", "write models:/mta-bank/3 or models:/mta-bank@champion"),
        ("models:/mta-bank/99", "does not give it (Model Version (name=mta-bank, version=99)"),
        ("models:/mta-bank@champion", "does not give it (Registered model alias champion not"),
    ],
)
def test_versions_that_are_not_there(
    elsewhere: Path, place: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    given = ["personalise", "--user", str(place / "new.json"), "--to", str(elsewhere / "to")]
    assert main([*given, "--run", name]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"mta: --run {name}: ")
    assert words in said
    assert said.count("\n") == 1
    assert not (elsewhere / "to").exists()


def test_a_given_base_model_is_found_by_its_hash(
    server: Mlflow, first: Any, elsewhere: Path, place: Path
) -> None:
    """It is not in MLflow: `--base` says where it lies here, and another one is refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTA_STORE", str(place / "mta" / "store"))
        run = saved(first, "given")
        register(server, server.client.create_run(server.experiment).info.run_id, run)
    MlflowClient(server.uri).set_registered_model_alias("mta-bank", "champion", "2")
    (place / "model").rename(place / "moved")
    try:
        file, to = place / "new.json", elsewhere / "to"
        with pytest.raises(InputError, match="there is no such folder, and it is no hub id"):
            [*personalise(Finished(run_of("models:/mta-bank@champion")), file, to)]
        run = run_of("models:/mta-bank@champion", str(place / "moved"))
        assert len([*personalise(Finished(run), file, to)]) == len(NEW)
        other = run_of("models:/mta-bank@champion", str(elsewhere))
        with pytest.raises(InputError, match="is not the model that this run began with"):
            [*personalise(Finished(other), file, elsewhere / "other")]
    finally:
        (place / "moved").rename(place / "model")

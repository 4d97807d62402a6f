"""Ids and texts that would harm as paths, names or pages are data, through every stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from mlflow import MlflowClient

from flows.lamp_task import collect
from tasks.config import resolve
from tasks.export import export
from tasks.forget.__main__ import main
from tasks.fusion import read_recipes
from tasks.lora.adapters import read_peft
from tasks.meta_lora import meta_lora
from tasks.report.files import write_run
from tasks.report.table import notes
from tasks.stage import store
from tasks.tracking.runs import Tracker
from tests.unit.stages import pipeline
from tests.unit.stages.users import user

# Paths; NUL and a line end; an override that shows text backwards; look-alikes (Cyrillic a, e);
# markup; longer than any file name may be (255 bytes); a format string; what separates CSV.
STRANGE = [
    "../../x",
    "/etc/passwd",
    "nul\0and\nline",
    "evil\u202etxt.exe",
    "\u0430nn\u0435",
    "anne",
    "<script>alert(1)</script>",
    "long" * 500,
    "{user}%s,\"'",
    "C:\\con",
]
MARK = "QUIXOTIC-PRIVATE-SENTENCE"


def _users(names: list[str], items: int, queries: int = 0) -> list[dict[str, Any]]:
    made = [user(name, items, queries) for name in names]
    for one in made:
        for record in (*one["profile"], *one["query"]):
            field = "description" if "description" in record else "input"
            record[field] += f" {MARK}"
    return made


ROLES = {
    "base": _users(["b1/../b", "b2"], 3),
    "anchor": _users([f"anchor {name}" for name in STRANGE], 5),
    "few_shot": _users(STRANGE, 4, queries=2),
}
COUNT = len(STRANGE)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """The place, the run, and all that was printed: logs go to the printer without a flow."""
    folder = tmp_path_factory.mktemp("strange")
    said: list[str] = []
    (folder / "inner").mkdir()
    with pipeline.prepared_place(folder / "inner") as place:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "builtins.print", lambda *args, **_: said.append(" ".join(map(str, args)))
            )
            options = {"anchors": pipeline.OPTIONS["anchors"] | {"count": COUNT}}
            done = pipeline.run(place, ROLES, **options)
        yield folder, done, "\n".join(said)


def test_every_stage_keeps_the_ids_as_they_are(ran: tuple[Path, dict[str, Any], str]) -> None:
    folder, done, _ = ran
    where = store()
    assert sorted(done["prepared"]["value"]["few_shot"]) == sorted(STRANGE)
    anchors = {one["user_id"] for one in done["anchors"]["value"]["anchors"]}
    assert anchors == {f"anchor {name}" for name in STRANGE}
    assert set(done["bank"]["value"]["ids"]) == anchors
    assert set(read_recipes(where, done["fusion"])) == set(STRANGE)
    answered = where.open(done["scores"]["mta"]["ref"]).folder / "predictions.parquet"
    assert set(pl.read_parquet(answered)["user_id"]) == set(STRANGE)
    # Nothing was written but below the model, the data and the store.
    assert {path.name for path in folder.iterdir()} == {"inner"}
    assert {path.name for path in (folder / "inner").iterdir()} == {"model", "data", "mta"}
    for path in where.root.rglob("*"):
        assert path.resolve().is_relative_to(where.root.resolve())
        assert not any(name in path.name for name in STRANGE)


def test_export_of_each(ran: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    _, done, _ = ran
    write_run("strange", done["config"], [done])
    run = json.loads((store().root.parent / "runs" / "strange.json").read_text())
    for number, name in enumerate(STRANGE):
        to = tmp_path / str(number)
        export(store(), run, "LaMP-2M", "mta", name, to)
        assert read_peft(to).rank > 0
        assert json.loads((to / "mta.json").read_text())["user"] == name
    assert len(list(tmp_path.iterdir())) == COUNT


def test_names_of_task_runs_and_missing_pieces(ran: tuple[Path, dict[str, Any], str]) -> None:
    from prefect.states import Failed

    class Run:
        state = Failed(message="no")

        def wait(self) -> None: ...

    missing: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.lamp_task.as_completed", lambda runs: runs)
        patch.setattr("flows.lamp_task.Progress", lambda *_: pipeline_progress())
        collect([Run() for _ in STRANGE], [(name,) for name in STRANGE], "anchor", "x: y", missing)
        for name in STRANGE:
            job = {"anchors": [{"user_id": name}]}
            made = meta_lora.task_run_name(parameters=job)  # type: ignore[operator,misc,call-arg]
            assert made.isprintable()
            assert len(made) < 100
    assert len(set(missing)) == COUNT
    assert all(line.isprintable() for line in missing)


def pipeline_progress() -> Any:
    return type("P", (), {"advance": lambda self: None})()


def test_mlflow_takes_it(
    ran: tuple[Path, dict[str, Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and tags are printable, paths of artifacts are this project's own, no text is there."""
    _, done, _ = ran
    where = store()
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(uri)
    client.create_experiment("mta", (tmp_path / "artifacts").as_uri())
    trained = {}
    for record in where.root.glob("meta_lora/*/*/record.json"):
        piece = where.find("meta_lora", record.parent.name)
        assert piece is not None
        trained[piece.value["anchor"]] = {
            "ref": piece.ref, "value": piece.value, "notes": piece.notes, "cached": True,
        }  # fmt: skip
    tracker = Tracker(resolve({}), "strange", {"prefect_server": "x"})
    summary = done | {"several_seeds": False}
    for anchor in done["anchors"]["value"]["anchors"]:
        tracker._anchor_run(summary, tracker.config, anchor, trained[anchor["user_id"]])
    tracker.close()
    runs = client.search_runs(["1"], "tags.kind = 'anchor'")
    assert len({run.data.tags["anchor"] for run in runs}) == COUNT
    for run in runs:
        told = [run.info.run_name, *run.data.tags.values(), *run.data.params.values()]
        assert all(text.isprintable() and MARK not in text for text in told)
        assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["adapter"]
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "artifacts"}
    assert MARK not in (tmp_path / "mlflow.db").read_bytes().decode("latin-1")


def test_no_text_is_printed_or_said(ran: tuple[Path, dict[str, Any], str]) -> None:
    """Logs, notes and what is recorded beside the store hold ids and counts; no history."""
    _, done, said = ran
    assert "10 few-shot users" in said  # the log was caught
    assert MARK not in said
    own = {"kind": done["config"], "anchors": done["anchors"]}
    summary = {**done, "missing": [], "banks": {"mta": own}, "several_seeds": False}
    assert MARK not in "\n".join(notes(summary, store()))
    values = [done[name]["value"] for name in ("prepared", "embedded", "anchors", "bank", "fusion")]
    values += [one["value"] for one in (*done["scores"].values(), *done["stacking"]["mta"])]
    assert MARK not in json.dumps(values, default=str)
    # A line of the log stays one, whatever the ids are.
    assert all(line.isprintable() for line in said.split("\n"))
    # Users' tables do hold the texts.
    table = store().open(done["prepared"]["ref"]).folder / "few_shot.parquet"
    assert MARK in pl.read_parquet(table).write_json()


def test_each_can_be_forgotten(
    ran: tuple[Path, dict[str, Any], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = store().root.parent
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    for number, name in enumerate(STRANGE):
        copy = tmp_path / str(number)
        shutil.copytree(original, copy)
        assert main([name, "--store", str(copy / "store")]) == 0, capsys.readouterr().err

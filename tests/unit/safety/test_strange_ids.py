"""Ids and texts that would harm as paths, names or pages are data, through every stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from prefect.states import Failed

from tasks.export import Finished, export
from tasks.lora.adapters import read_peft
from tasks.recipes import read_recipes
from tasks.report.files import read_run, write_run
from tasks.report.notes import cell_notes
from tasks.results.run import Cell, Run
from tasks.results.stage import CELL, Job, Stage, StageFailed
from tasks.results.store import store
from tasks.tools.main import main
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
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Cell, str]]:
    """The place, the cell, and all that was printed: logs go to the printer without a flow."""
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


def test_every_stage_keeps_the_ids_as_they_are(ran: tuple[Path, Cell, str]) -> None:
    folder, done, _ = ran
    where, merging, scored = store(), done.merging("mta"), done.scored("mta")
    assert merging
    assert scored
    assert sorted(done.users.few_shot_ids) == sorted(STRANGE)
    anchors = {one.name for one in merging.chosen.anchors}
    assert anchors == {f"anchor {name}" for name in STRANGE}
    assert set(merging.merged.bank.names) == anchors
    assert set(read_recipes(merging.merged.recipes)) == set(STRANGE)
    assert set(pl.read_parquet(where.path(scored.predictions))["user_id"]) == set(STRANGE)
    # Nothing was written but below the model, the data and the store.
    assert {path.name for path in folder.iterdir()} == {"inner"}
    assert {path.name for path in (folder / "inner").iterdir()} == {"model", "data", "mta"}
    for path in where.root.rglob("*"):
        assert path.resolve().is_relative_to(where.root.resolve())
        assert not any(name in path.name for name in STRANGE)


def test_export_of_each(ran: tuple[Path, Cell, str], tmp_path: Path) -> None:
    _, done, _ = ran
    write_run(run_of(done))
    run = read_run("strange")
    for number, name in enumerate(STRANGE):
        to = tmp_path / str(number)
        export(Finished(run, "LaMP-2M", "mta"), name, to)
        assert read_peft(to).rank > 0
        assert json.loads((to / "mta.json").read_text())["user"] == name
    assert len(list(tmp_path.iterdir())) == COUNT


def run_of(cell: Cell) -> Run:
    about = {"name": "strange", "date": "2026-11-28 07:00", "report": "strange"}
    return Run(id="strange", config={}, cells=(cell,), **about)


def test_names_of_task_runs_and_missing_pieces(
    ran: tuple[Path, Cell, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of jobs of one anchor each, every second of which fails; and of users whose training ends."""
    folder, *_ = ran
    real, names = Stage.made, []

    def made(self: Stage[..., Any], arguments: dict[str, Any]) -> Any:
        if self.name == "meta_lora":
            names.append(CELL.get())
            if len(names) % 2:
                raise StageFailed("no")
        return real(self, arguments)

    def submit(self: Stage[..., Any], *args: Any) -> Any:
        try:
            return real_submit(self, *args)
        except StageFailed as error:
            return Job(self.name, Failed(message=str(error)))

    real_submit = Stage.submit
    monkeypatch.setattr(Stage, "made", made)
    monkeypatch.setattr(Stage, "submit", submit)
    options = {
        "anchors": pipeline.OPTIONS["anchors"] | {"count": COUNT, "per_job": 1},
        "stacking": pipeline.OPTIONS["stacking"] | {"learning_rate": 1e30},
    }
    missing = pipeline.run(folder / "inner", ROLES, methods=["mta"], **options).missing
    assert len(set(names)) == COUNT
    assert all(name.isprintable() and len(name) < 120 for name in names)
    assert sum("anchor " in line and line.endswith(": no") for line in missing) == COUNT // 2
    assert sum("training of user " in line for line in missing) == COUNT
    assert len(set(missing)) == len(missing)
    assert all(line.isprintable() for line in missing)


def test_no_text_is_printed_or_said(ran: tuple[Path, Cell, str]) -> None:
    """Logs, notes and what is recorded beside the store hold ids and counts; no history."""
    _, done, said = ran
    assert "10 few-shot users" in said  # the log was caught
    assert MARK not in said
    assert MARK not in "\n".join(cell_notes(done))
    assert MARK not in run_of(done).model_dump_json()
    # A line of the log stays one, whatever the ids are.
    assert all(line.isprintable() for line in said.split("\n"))
    # Users' tables do hold the texts.
    assert MARK in pl.read_parquet(store().path(done.users.few_shot)).write_json()


def test_each_can_be_forgotten(
    ran: tuple[Path, Cell, str],
    tmp_path: Path,
    mlflow_tables: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = store().state
    mlflow = shutil.copy(mlflow_tables, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlflow}")
    for number, name in enumerate(STRANGE):
        copy = tmp_path / str(number)
        # A run's file would name a flow run, which no server here has.
        shutil.copytree(original, copy, ignore=shutil.ignore_patterns("runs"))
        forgotten = main(["forget", "--store", str(copy / "store"), "--", name])
        assert forgotten == 0, capsys.readouterr().err

"""A run that has ended, made by hand: one LaMP task, three methods, a bank of a few anchors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tasks.config.run import resolve
from tasks.record import File
from tasks.report.files import REPORTS_FOLDER, write_state
from tasks.results.models import Answers, Compared, Merged, MetaLora, Training
from tasks.results.run import Cell, Merging, Run
from tasks.results.store import store
from tasks.tracking import runs
from tests.unit.report import cells
from tests.unit.report.cells import estimate

METHODS = ("base", "merge_only", "mta")
# The optimum has a row in the table, but no model answered.
ROWS = (*METHODS, "oracle")
NAME, ID = "spry-llama", "0f0e0d0c-0b0a-4908-8706-050403020100"
# Its bank is no bank: tests/unit/stages/test_registry.py registers a real one.
GIVEN = {"methods": list(METHODS), "mlflow": {"register_bank": False}}


def stored(stage: str, *names: str) -> tuple[File, ...]:
    """Files of a new folder in the store; what is in each is its place."""
    with store().new(stage) as folder:
        for name in names:
            path = folder.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{stage} {name}\n")
    return tuple(folder.file(name) for name in names)


def meta_lora(number: int, steps: int) -> MetaLora:
    with store().new("meta_lora") as folder:
        adapter = folder.path / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text("{}")
        (adapter / "adapter_model.safetensors").write_bytes(number.to_bytes(2) * 10_000)
    losses = tuple(1.0 / step for step in range(1, steps + 1))
    return MetaLora(
        anchor=f"anchor-{number}",
        members=(f"anchor-{number}",),
        adapter=folder.file("adapter"),
        training=Training(items=9, steps=steps, tokens=99, truncated=0, losses=losses, seconds=1.5),
    )


def merging(anchors: int, steps: int) -> Merging:
    file, users_map = stored("bank", "bank.safetensors", "map.png")
    (chosen,), (table,) = stored("anchors", "anchors.parquet"), stored("fusion", "recipes.parquet")
    members = tuple(meta_lora(number, steps) for number in range(anchors))
    listed = [cells.anchor(one.anchor, 2) for one in members]
    one = cells.merging(("merge_only", "mta"), listed, asked=anchors)
    parts = {"file": file, "members": members, "map": users_map, "cached": True}
    merged = Merged(
        bank=one.merged.bank.model_copy(update=parts),
        recipes=one.merged.recipes.model_copy(update={"table": table}),
        how="stack",
    )
    anchors_chosen = one.chosen.model_copy(update={"table": chosen})
    return one.model_copy(update={"chosen": anchors_chosen, "merged": merged})


def compared() -> Compared:
    names = [f"{name}/{file}" for name in METHODS for file in ("golds.json", "predictions.parquet")]
    files = dict(zip(names, stored("compare", *names), strict=True))
    found = cells.compared(**{name: files[f"{name}/predictions.parquet"] for name in METHODS})
    scored = [
        one.model_copy(update={"golds": files[f"{one.method}/golds.json"]}) for one in found.scored
    ]
    intervals = {name: {"accuracy": estimate(0.5, 0.25)} for name in ROWS}
    parts = {"methods": ROWS, "intervals": intervals, "scored": tuple(scored)}
    return found.model_copy(update=parts)


def ended_cell(anchors: int, steps: int) -> Cell:
    sides = ("base", "anchor", "few_shot", "pooled")
    files = stored("prepare", *(f"{side}.parquet" for side in sides))
    (predictions, work) = stored("answers", "predictions.parquet", "work.parquet")
    answers = Answers(users=("few-1", "few-2"), predictions=predictions, work=work, seconds=30.0)
    users = cells.users(
        **dict(zip(sides, files, strict=True)), few_shot_ids=("few-1", "few-2"),
        counts={"queries": 6}, dropped={"empty": 1}, audit={"looked": 1},
    )  # fmt: skip
    return cells.cell(
        compared(),
        seed=0,
        given=GIVEN,
        users=users,
        mergings=(merging(anchors, steps),),
        answers={name: (answers, answers.model_copy(update={"cached": True})) for name in METHODS},
    )


def ended_run(anchors: int = 3, steps: int = 4, **changed: Any) -> Run:
    """A run; its table and its report lie beside the store."""
    cell = ended_cell(anchors, steps)
    write_state(f"{REPORTS_FOLDER}/{NAME}.txt", "the table\n")
    write_state(f"{REPORTS_FOLDER}/{NAME}.html", "<p>the report \u00e9</p>\n")
    about = {"id": ID, "name": NAME, "date": "2026-03-04 05:06", "report": NAME}
    about |= {"config": resolve(GIVEN).model_dump(mode="json"), "overall": cell.compared}
    about |= {"summary": ("3 methods on LaMP-2M.", "mta is ahead.")}
    return cells.run(cell, **(about | changed))


def begun(run: Run) -> Run:
    """The run as it is when the flow begins."""
    return run.model_copy(update={"cells": (), "overall": None, "missing": (), "summary": ()})


def stub_report(patch: pytest.MonkeyPatch) -> None:
    """Tables of known numbers in place of those that tasks/report works out."""

    def rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
        return [
            {"lamp_task": cell.config.lamp_task, "method": name, "accuracy": 0.5,
             "accuracy_lo": 0.25, "accuracy_hi": None, "users": 3}
            for cell in cells
            for name in ROWS
        ]  # fmt: skip

    def mean_rows(_overall: Compared) -> list[dict[str, Any]]:
        return [
            {"lamp_task": "mean of 1", "method": name, "score": 0.75, "groups": 3} for name in ROWS
        ]

    patch.setattr(runs, "rows", rows)
    patch.setattr(runs, "mean_rows", mean_rows)

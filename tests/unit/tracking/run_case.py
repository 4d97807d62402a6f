"""A run that has ended, made by hand: one LaMP task, three methods, a bank of a few anchors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tasks.config.run import resolve
from tasks.files import write_atomic
from tasks.lamp.definitions import get_task
from tasks.record import File
from tasks.results.models import (
    Anchor,
    Anchors,
    Answers,
    Bank,
    Base,
    Compared,
    Embedded,
    Estimate,
    Merged,
    MetaLora,
    Prepared,
    Recipes,
    Scored,
    Training,
)
from tasks.results.run import Cell, Merging, Run
from tasks.results.store import store
from tasks.tracking import runs

METHODS = ("base", "merge_only", "mta")
# The optimum has a row in the table, but no model answered.
ROWS = (*METHODS, "oracle")
NAME, ID = "spry-llama", "0f0e0d0c-0b0a-4908-8706-050403020100"


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
        training=Training(items=9, steps=steps, tokens=99, truncated=0, losses=losses),
        seconds=1.5,
    )


def merging(anchors: int, steps: int) -> Merging:
    (table,) = stored("embed", "embeddings.parquet")
    (chosen,) = stored("anchors", "anchors.parquet")
    bank, users_map = stored("bank", "bank.safetensors", "map.png")
    (recipes,) = stored("fusion", "recipes.parquet")
    members = tuple(meta_lora(number, steps) for number in range(anchors))
    listed = tuple(
        Anchor(name=one.anchor, items=9, cluster=2, members=one.members) for one in members
    )
    return Merging(
        methods=("merge_only", "mta"),
        embedded=Embedded(table=table, centred=True, users=9, dimensions=4),
        chosen=Anchors(
            table=chosen, anchors=listed, whole_clusters=0, asked=anchors, candidates=9,
            eligible=9, clusters=3, noise=0,
        ),
        merged=Merged(
            bank=Bank(file=bank, members=members, rank=2, scale=1.0, map=users_map, cached=True),
            recipes=Recipes(table=recipes, users=3, anchors_per_user=2, without_similar_anchor=0),
            how="stack",
        ),
    )  # fmt: skip


def compared() -> Compared:
    names = [
        f"{method}/{file}" for method in METHODS for file in ("golds.json", "predictions.parquet")
    ]
    files = dict(zip(names, stored("compare", *names), strict=True))
    return Compared(
        task=get_task("LaMP-2M"),
        groups=3,
        queries=6,
        methods=ROWS,
        intervals={name: {"accuracy": Estimate(point=0.5, lo=0.25, hi=None)} for name in ROWS},
        differences={},
        scored=tuple(
            Scored(
                method=name,
                metrics={"accuracy": 0.5},
                users=3,
                queries=6,
                predictions=files[f"{name}/predictions.parquet"],
                golds=files[f"{name}/golds.json"],
            )
            for name in METHODS
        ),
    )


def ended_run(anchors: int = 3, steps: int = 4, **changed: Any) -> Run:
    """A run; its table and its report lie beside the store."""
    config = resolve({"methods": list(METHODS)})
    sides = stored(
        "prepare", "base.parquet", "anchor.parquet", "few_shot.parquet", "pooled.parquet"
    )
    (predictions, work) = stored("answers", "predictions.parquet", "work.parquet")
    answers = Answers(users=("few-1", "few-2"), predictions=predictions, work=work, seconds=30.0)
    score = compared()
    cell = Cell(
        config=config.for_task("LaMP-2M", 0),
        users=Prepared(
            task=get_task("LaMP-2M"), base=sides[0], anchor=sides[1], few_shot=sides[2],
            pooled=sides[3], few_shot_ids=("few-1", "few-2"), instruction="Which tag?",
            longest_candidate=9, counts={"queries": 6}, dropped={"empty": 1}, split={"kind": "x"},
            audit={"looked": 1}, authors={"few_shot": ["few-1"]},
        ),
        base=Base(model="tiny", content="c0", dtype="float32", max_tokens=128),
        mergings=(merging(anchors, steps),),
        answers={name: (answers, answers.model_copy(update={"cached": True})) for name in METHODS},
        compared=score,
    )  # fmt: skip
    reports = store().state / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    write_atomic(reports / f"{NAME}.txt", b"the table\n")
    write_atomic(reports / f"{NAME}.html", "<p>the report \u00e9</p>\n".encode())
    run = Run(
        id=ID,
        name=NAME,
        date="2026-03-04 05:06",
        report=NAME,
        config=config.model_dump(mode="json"),
        cells=(cell,),
        overall=score,
        summary=("3 methods on LaMP-2M.", "mta is ahead."),
    )
    return run.model_copy(update=changed)


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

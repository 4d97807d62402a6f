"""Results of a LaMP task made by hand, for what reads a run: they hold what a test is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from tasks.config.run import resolve
from tasks.lamp.definitions import get_task
from tasks.lamp.metrics import Rules
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

NOWHERE = File(uri="none/00/00", sha256="00")
COUNTS = {
    "few_shot_groups": 3, "few_shot_users": 3, "queries_in_other_profiles": 0, "queries": 9
}  # fmt: skip


def stored(stage: str, table: pl.DataFrame) -> File:
    """A table in the store."""
    with store().new(stage) as folder:
        table.write_parquet(folder.path / "table.parquet")
    return folder.file("table.parquet")


def estimate(point: float | None, lo: float | None = None, hi: float | None = None) -> Estimate:
    return Estimate(point=point, lo=lo, hi=hi)


def answered(answers: Sequence[str]) -> File:
    """The answers to the queries q0, q1 and so on, stored from the last to the first."""
    rows = [
        {"user_id": "u", "query_id": f"q{n}", "gold": "1", "prediction": answer}
        for n, answer in reversed(list(enumerate(answers)))
    ]
    return stored("compare", pl.DataFrame(rows))


def compared(
    lamp_task: str = "LaMP-2M",
    rules: Rules = "lamp",
    tokenless: int = 0,
    no_label: Mapping[str, float] | None = None,
    **answers: File,
) -> Compared:
    """The comparison of methods of whom nothing is known but their answers.

    no_label: the share of each method's that is no label.
    """
    return Compared(
        task=get_task(lamp_task),
        rules=rules,
        groups=2,
        queries=9,
        methods=tuple(answers),
        intervals={},
        differences={},
        scored=tuple(
            Scored(
                method=method,
                users=2,
                queries=9,
                predictions=file,
                golds=NOWHERE,
                no_label=(no_label or {}).get(method),
            )
            for method, file in answers.items()
        ),
        golds_without_token=tokenless,
    )


def cell(
    result: Compared, seed: int = 5, given: Mapping[str, Any] | None = None, **parts: Any
) -> Cell:
    """A cell of this comparison. given: to `resolve`. parts: of the cell, instead of none."""
    assert result.task is not None
    config = resolve(dict(given or {})).for_task(result.task.name, seed)
    parts = {"users": users(result.task.name), "mergings": (), "answers": {}} | parts
    base = Base(model="tiny", content="c", dtype="float32", max_tokens=64)
    return Cell(config=config, base=base, compared=result, **parts)


def users(lamp_task: str = "LaMP-2M", **parts: Any) -> Prepared:
    """The users of a LaMP task. parts: instead of no files and few counts."""
    files = dict.fromkeys(("base", "anchor", "few_shot", "pooled"), NOWHERE)
    about: dict[str, Any] = {
        "counts": COUNTS, "dropped": {}, "audit": {}, "few_shot_ids": (), "instruction": "",
        "longest_candidate": 9,
    }  # fmt: skip
    return Prepared(task=get_task(lamp_task), **(files | about | parts))


def batch(size: int, work: Sequence[tuple[int, int, float]]) -> Answers:
    """Answers to some users. size: of a user's LoRA. work: steps, tokens, seconds of each."""
    rows = [
        {"user_id": f"u{n}", "seconds": seconds, "steps": steps, "tokens": tokens,
         "truncated": 0, "failed": False}
        for n, (steps, tokens, seconds) in enumerate(work)
    ]  # fmt: skip
    table = stored("answers", pl.DataFrame(rows))
    return Answers(users=(), predictions=NOWHERE, work=table, bytes_per_user=size)


def merging(
    methods: Sequence[str],
    anchors: Sequence[Anchor] = (),
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
    trained: Mapping[str, str] | None = None,
    asked: int = 0,
) -> Merging:
    """A bank and recipes. recipes: of each user. trained: the hash of each anchor's LoRA."""
    table = NOWHERE
    if recipes:
        rows = [{"user_id": user, "seconds": 0.0, **recipe} for user, recipe in recipes.items()]
        table = stored("fusion", pl.DataFrame(rows))
    members = {one.name: one.members for one in anchors}
    return Merging(
        methods=tuple(methods),
        embedded=Embedded(table=NOWHERE, centred=True, users=9, dimensions=4),
        chosen=Anchors(
            table=NOWHERE, anchors=tuple(anchors), whole_clusters=0, asked=asked, candidates=9,
            eligible=9, clusters=2, noise=1,
        ),
        merged=Merged(
            bank=Bank(
                file=NOWHERE,
                members=tuple(
                    _meta_lora(name, members.get(name, (name,)), sha256)
                    for name, sha256 in (trained or {}).items()
                ),
            ),
            recipes=Recipes(table=table, users=3, anchors_per_user=2, without_similar_anchor=0),
            how="stack",
        ),
    )  # fmt: skip


def anchor(name: str, cluster: int = 0) -> Anchor:
    return Anchor(name=name, items=9, cluster=cluster, members=(name,))


def run(*cells: Cell, **about: Any) -> Run:
    """A run of these cells."""
    named = {"id": "run-1", "name": "owl", "date": "today", "report": "owl", "config": {}}
    return Run(**(named | {"cells": cells} | about))


def _meta_lora(name: str, members: tuple[str, ...], sha256: str) -> MetaLora:
    training = Training(items=9, steps=1, tokens=9, truncated=0, losses=(1.0,))
    adapter = File(uri=f"meta_lora/{sha256}/{sha256}/adapter", sha256=sha256)
    return MetaLora(anchor=name, members=members, adapter=adapter, training=training)

"""What methods answered: methods that answer alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from tasks.report.answers import identical
from tasks.store.artifacts import Store
from tasks.store.pieces import digest

LABELS = ["comedy", "action", "classic"]


def scored(where: Store, answers: list[str], rules: str = "lamp") -> dict[str, Any]:
    """A `score` result: queries q0, q1 and so on, stored from the last to the first."""

    def make(out: Path) -> dict[str, Any]:
        rows = [
            {"user_id": "u", "query_id": f"q{n}", "gold": "1", "prediction": answer}
            for n, answer in reversed(list(enumerate(answers)))
        ]
        pl.DataFrame(rows).write_parquet(out / "predictions.parquet")
        return {"rules": rules}

    piece = where.get("score", digest([answers, rules]), make)
    return {"ref": piece.ref, "value": piece.value}


def summary(lamp_task: str, **scores: dict[str, Any]) -> dict[str, Any]:
    about = {"lamp_task": lamp_task, "seed": 5, "several_seeds": False, "base": {}}
    return {**about, "scores": scores}


def test_who_answered_alike_everywhere(where: Store) -> None:
    same, other = scored(where, LABELS), scored(where, [*LABELS[:2], "war"])
    first = summary("LaMP-2M", base=same, rag=same, oppu=other, merge_only=other, mta=same)
    assert identical([first], where) == [["base", "rag", "mta"], ["oppu", "merge_only"]]
    # The other LaMP task tells rag from base, and lacks merge_only.
    second = summary("LaMP-3", base=same, rag=other, oppu=same, mta=same)
    assert identical([first, second], where) == [["base", "mta"]]
    # The same texts to other queries are other answers.
    fewer = scored(where, LABELS[:2])
    assert identical([summary("LaMP-2M", base=same, mta=fewer)], where) == []

"""What methods answered: answers that are no label, and methods that answer alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.report.answers import identical, no_label_lines, no_labels
from tasks.store.artifacts import Store
from tasks.store.pieces import digest

LABELS = ["comedy", "action", "classic"]


def scored(
    where: Store, answers: list[str], rules: str = "lamp", tokenless: int = 0
) -> dict[str, Any]:
    """A `score` result: queries q0, q1 and so on, stored from the last to the first."""

    def make(out: Path) -> dict[str, Any]:
        rows = [
            {"user_id": "u", "query_id": f"q{n}", "gold": "1", "prediction": answer}
            for n, answer in reversed(list(enumerate(answers)))
        ]
        pl.DataFrame(rows).write_parquet(out / "predictions.parquet")
        return {"rules": rules}

    piece = where.get("score", digest([answers, rules]), make)
    return {"ref": piece.ref, "value": piece.value, "notes": {"golds_without_token": tokenless}}


def summary(lamp_task: str, **scores: dict[str, Any]) -> dict[str, Any]:
    about = {"lamp_task": lamp_task, "seed": 5, "several_seeds": False, "base": {}}
    return {**about, "scores": scores}


def test_shares_and_the_first_examples(where: Store) -> None:
    """Four of five: the case counts, a sentence is no label; spaces around one are nothing."""
    said = scored(where, ["Comedy", " comedy ", "It is a comedy, based on", "", "4"])
    found = no_labels(summary("LaMP-2M", base=said, mta=scored(where, LABELS)), where)
    assert found == {
        "base": {
            "share": 0.8,
            "examples": [["q0", "Comedy"], ["q2", "It is a comedy, based on"], ["q3", ""]],
        },
        "mta": {"share": 0.0, "examples": []},
    }
    # Of ratings what float() reads is one, by the rules in force.
    ratings = ["4", "4.5", "nan", "four"]
    for rules, share in (("lamp", 0.25), ("mta_published", 0.5)):
        found = no_labels(summary("LaMP-3", base=scored(where, ratings, rules)), where)
        assert found["base"]["share"] == share
    # A headline may be anything.
    assert no_labels(summary("LaMP-4", base=said), where) == {}


@pytest.mark.parametrize(
    ("lamp_task", "wrong"),
    [("LaMP-2M", "so wrong"), ("LaMP-3", "so taken as 1 or 5, whichever is farther off")],
)
def test_a_line_says_what_helps(where: Store, lamp_task: str, wrong: str) -> None:
    """Above a fifth, of any method; no answer is in it."""
    label = "comedy" if lamp_task == "LaMP-2M" else "5"
    given = {
        "base": scored(where, ["no"] * 5),
        "rag": scored(where, ["no", "no", label]),
        "mta": scored(where, ["no"] + [label] * 4),
    }
    one = summary(lamp_task, **given)
    line = (
        f"answers that are no label, {wrong}: base 100%, rag 67%; "
        "scoring.answer=likelihood chooses among the labels"
    )
    taught = ", base.task_adapt.enabled=true teaches them"
    assert no_label_lines(one, where) == [f"{lamp_task}: {line}{taught}"]
    one |= {"base": {"adapter": {}}, "several_seeds": True}
    assert no_label_lines(one, where) == [f"{lamp_task} seed 5: {line}"]
    assert no_label_lines(summary(lamp_task, mta=given["mta"]), where) == []


def test_who_answered_alike_everywhere(where: Store) -> None:
    same, other = scored(where, LABELS), scored(where, [*LABELS[:2], "war"])
    first = summary("LaMP-2M", base=same, rag=same, oppu=other, merge_only=other, mta=same)
    assert identical([first], where) == [["base", "rag", "mta"], ["oppu", "merge_only"]]
    # The other LaMP task tells rag from base, and lacks merge_only.
    second = summary("LaMP-3", base=same, rag=other, oppu=same, mta=same)
    assert identical([first, second], where) == [["base", "mta"]]
    # The same texts to other queries are other answers.
    turned, fewer = scored(where, LABELS[::-1]), scored(where, LABELS[:2])
    assert identical([summary("LaMP-2M", base=same, rag=turned, mta=fewer)], where) == []

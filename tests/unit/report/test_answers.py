"""What methods answered: answers that are no label, and methods that answer alike."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.report.answers import NoLabel, identical, no_label_lines, no_labels
from tasks.results.store import Store
from tests.unit.report.cells import NOWHERE, answered, cell, compared

LABELS = ["comedy", "action", "classic"]
TWO_SEEDS = {"seeds": [5, 6]}


def test_shares_and_the_first_examples(where: Store) -> None:
    """Four of five: the case counts, a sentence is no label; spaces around one are nothing."""
    said = answered(["Comedy", " comedy ", "It is a comedy, based on", "", "4"])
    found = no_labels(cell(compared("LaMP-2M", base=said, mta=answered(LABELS))))
    assert found == {
        "base": NoLabel(
            cell="LaMP-2M",
            method="base",
            share=0.8,
            examples=(("q0", "Comedy"), ("q2", "It is a comedy, based on"), ("q3", "")),
        ),
        "mta": NoLabel(cell="LaMP-2M", method="mta", share=0.0, examples=()),
    }
    # Of ratings what float() reads is one, by the rules in force.
    ratings = answered(["4", "4.5", "nan", "four"])
    for rules, share in (("lamp", 0.25), ("mta_published", 0.5)):
        found = no_labels(cell(compared("LaMP-3", rules, base=ratings)))
        assert found["base"].share == share
    # A headline may be anything.
    assert no_labels(cell(compared("LaMP-4", base=said))) == {}


@pytest.mark.parametrize(
    ("lamp_task", "wrong"),
    [("LaMP-2M", "so wrong"), ("LaMP-3", "so taken as 1 or 5, whichever is farther off")],
)
def test_a_line_says_what_helps(where: Store, lamp_task: str, wrong: str) -> None:
    """Above a fifth, of any method; no answer is in it."""
    label = "comedy" if lamp_task == "LaMP-2M" else "5"
    given = {
        "base": answered(["no"] * 5),
        "rag": answered(["no", "no", label]),
        "mta": answered(["no"] + [label] * 4),
    }
    one = cell(compared(lamp_task, **given))
    line = (
        f"answers that are no label, {wrong}: base 100%, rag 67%; "
        "scoring.answer=likelihood chooses among the labels"
    )
    taught = ", base.task_adapt.enabled=true teaches them"
    assert no_label_lines(one) == [f"{lamp_task}: {line}{taught}"]
    adapted: dict[str, Any] = {"base": one.base.model_copy(update={"adapter": NOWHERE})}
    one = cell(compared(lamp_task, **given), given=TWO_SEEDS).model_copy(update=adapted)
    assert no_label_lines(one) == [f"{lamp_task} seed 5: {line}"]
    assert no_label_lines(cell(compared(lamp_task, mta=given["mta"]))) == []


def test_who_answered_alike_everywhere(where: Store) -> None:
    same, other = answered(LABELS), answered([*LABELS[:2], "war"])
    first = cell(compared(base=same, rag=same, oppu=other, merge_only=other, mta=same))
    assert identical([first]) == [["base", "rag", "mta"], ["oppu", "merge_only"]]
    # The other LaMP task tells rag from base, and lacks merge_only.
    second = cell(compared("LaMP-3", base=same, rag=other, oppu=same, mta=same))
    assert identical([first, second]) == [["base", "mta"]]
    # The same texts to other queries are other answers.
    turned, fewer = answered(LABELS[::-1]), answered(LABELS[:2])
    assert identical([cell(compared(base=same, rag=turned, mta=fewer))]) == []

"""What methods answered: answers that are no label, and methods that answer alike."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.report.notes import cell_notes, identical
from tasks.report.page import NoLabel, no_labels
from tasks.results.store import Store
from tests.unit.report.cells import NOWHERE, answered, cell, compared

LABELS = ["comedy", "action", "classic"]
TWO_SEEDS = {"seeds": [5, 6]}


def test_the_first_examples(where: Store) -> None:
    """By query id; none where every answer is a label."""
    said = answered(["Comedy", " comedy ", "It is a comedy, based on", "", "4"])
    shares = {"base": 0.8, "mta": 0.0}
    one = cell(compared(no_label=shares, base=said, mta=answered(LABELS)))
    examples = [("q0", "Comedy"), ("q2", "It is a comedy, based on"), ("q3", "")]
    assert no_labels(one) == [NoLabel("LaMP-2M", "base", 0.8, examples)]


@pytest.mark.parametrize(
    ("lamp_task", "wrong"),
    [("LaMP-2M", "so wrong"), ("LaMP-3", "so taken as 1 or 5, whichever is farther off")],
)
def test_a_line_says_what_helps(lamp_task: str, wrong: str) -> None:
    """Above a fifth, of any method; no answer is in it."""
    shares = {"base": 1.0, "rag": 2 / 3, "mta": 0.2}
    result = compared(lamp_task, no_label=shares, **dict.fromkeys(shares, NOWHERE))
    line = (
        f"answers that are no label, {wrong}: base 100%, rag 67%; "
        "scoring.answer=likelihood chooses among the labels"
    )
    taught = ", base.task_adapt.enabled=true teaches them"
    one = cell(result)
    assert cell_notes(one) == [f"{lamp_task}: {line}{taught}"]
    adapted: dict[str, Any] = {"base": one.base.model_copy(update={"adapter": NOWHERE})}
    one = cell(result, given=TWO_SEEDS).model_copy(update=adapted)
    assert cell_notes(one) == [f"{lamp_task} seed 5: {line}"]
    assert cell_notes(cell(compared(lamp_task, no_label={"mta": 0.2}, mta=NOWHERE))) == []


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

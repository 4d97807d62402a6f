"""Prompts and the history in them."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.lamp.definitions import get_task
from tasks.lamp.prompts import (
    Prompts,
    Sample,
    instruction_of,
    question_text,
)
from tests.unit.lamp.helpers import how

TASK = get_task("LaMP-2M")
PROFILE = [
    {"id": "1", "text": "red fox\n runs", "answer": "comedy"},
    {"id": "2", "text": "blue whale swims", "answer": " action "},
    {"id": "3", "text": "red fox sleeps", "answer": "romance"},
    # With two others only, a word that one of them has would count for nothing: ln(1.5 / 1.5).
    {"id": "4", "text": "green parrot sings", "answer": "violence"},
]
INSTRUCTION = "Which tag? description: "
QUERIES = [{"id": "q", "input": INSTRUCTION + "red  fox description: x", "gold": "classic"}]


def test_compact_without_history() -> None:
    assert Prompts(TASK, how(), INSTRUCTION).of_items(PROFILE) == [
        Sample("1", "description: red fox runs tag:", "comedy"),
        Sample("2", "description: blue whale swims tag:", "action"),
        Sample("3", "description: red fox sleeps tag:", "romance"),
        Sample("4", "description: green parrot sings tag:", "violence"),
    ]
    assert Prompts(TASK, how(), INSTRUCTION).of_queries(PROFILE, QUERIES) == [
        Sample("q", "description: red fox description: x tag:", "classic")
    ]


def test_compact_with_history() -> None:
    samples = Prompts(TASK, how("compact", 1), INSTRUCTION).of_items(PROFILE)
    assert samples[0].prompt == (
        "description: red fox sleeps tag: romance\ndescription: red fox runs tag:"
    )
    assert samples[2].prompt == (
        "description: red fox runs tag: comedy\ndescription: red fox sleeps tag:"
    )


def test_published() -> None:
    (sample,) = Prompts(TASK, how("published", 1), INSTRUCTION).of_queries(PROFILE, QUERIES)
    assert sample.prompt == (
        "### User History:\n"
        "Description: red fox runs Tag: comedy\n\n"
        "### User Instruction:\n"
        "Which tag?\n"
        "Description: red fox description: x Tag:"
    )


def test_what_is_completed_has_no_text_before_it() -> None:
    """A tweet is its own answer: nothing of it, and no neighbour found by it, stands before it."""
    tweets = get_task("LaMP-7")
    profile = [{"id": str(n), "text": text, "answer": text} for n, text in enumerate("ab")]
    for style, cue in (("compact", "tweet:"), ("published", "Tweet:")):
        assert Prompts(tweets, how(style, 2), "x").of_items(profile) == [
            Sample("0", cue, "a"),
            Sample("1", cue, "b"),
        ]


@pytest.mark.parametrize("style", ["compact", "published"])
def test_items_and_queries_read_alike(style: Any) -> None:
    """A query about an item, with the other items as its profile, is that item's own sample."""
    own = Prompts(TASK, how(style, 2), INSTRUCTION).of_items(PROFILE)[0]
    query = {"id": "1", "input": INSTRUCTION + PROFILE[0]["text"], "gold": "comedy"}
    assert Prompts(TASK, how(style, 2), INSTRUCTION).of_queries(PROFILE[1:], [query]) == [own]


@pytest.mark.parametrize("style", ["compact", "published"])
def test_never_shows_its_own_answer(style: Any) -> None:
    for sample, item in zip(
        Prompts(TASK, how(style, 5), INSTRUCTION).of_items(PROFILE),
        PROFILE,
        strict=True,
    ):
        assert item["answer"].strip() not in sample.prompt


@pytest.mark.parametrize("style", ["compact", "published"])
def test_one_item_has_no_history(style: Any) -> None:
    (sample,) = Prompts(TASK, how(style, 3), INSTRUCTION).of_items(PROFILE[:1])
    assert "comedy" not in sample.prompt
    assert "History" not in sample.prompt


def test_instruction_of() -> None:
    inputs = ["A description: x", "B description: y description: z", "B description: w", "none"]
    assert instruction_of(inputs, TASK) == "B description: "
    assert instruction_of(["none"], TASK) == TASK.instruction
    assert instruction_of([], TASK) == TASK.instruction
    assert question_text("no marker", TASK) == "no marker"

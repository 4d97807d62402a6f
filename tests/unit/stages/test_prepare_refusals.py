"""A refusal says first what was dropped and why. Counts are those of the users written here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.base_model import base_model
from tasks.config.run import resolve
from tasks.config.task import TaskConfig
from tasks.errors import InputError
from tasks.prepare import prepared_users
from tasks.results.store import Store
from tests.official import write_official
from tests.unit.stages.users import user, write_users

LABELS = "profile item with a label outside the task's set"
GOLDS = "query with a gold outside the task's set"
NOBODY = "user with no profile items left"
OWN = ("good", "bad", "so so, " + "x" * 99, "meh")


def users(count: int = 9, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Any:
    """Users of four items and one query each."""
    made = [user(f"u{number}", 4, queries=1) for number in range(count)]
    for one in made:
        change(one)
    return made


def own_labels(one: dict[str, Any]) -> None:
    for item, label in zip(one["profile"], OWN, strict=True):
        item["tag"] = label
    one["query"][0]["gold"] = "good"


def own_golds(one: dict[str, Any]) -> None:
    one["query"][0]["gold"] = "5 stars"


def no_text(one: dict[str, Any]) -> None:
    for item in one["profile"]:
        item["description"] = " "


def no_gold(one: dict[str, Any]) -> None:
    one["query"][0]["gold"] = None


def one_label(one: dict[str, Any]) -> None:
    one["profile"][0]["tag"] = "none"


def config(data: Path, lamp_task: str = "LaMP-2M", **given: Any) -> TaskConfig:
    settings = {"data": str(data), "anchors": {"min_items": 1}, "items_curve": [], **given}
    return resolve(settings).for_task(lamp_task, 0)


def refusal(data: Path, lamp_task: str = "LaMP-2M", **given: Any) -> str:
    with pytest.raises(InputError) as caught:
        prepared_users(config(data, lamp_task, **given))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["grouped", "published"])
@pytest.mark.parametrize(
    ("change", "first"),
    [
        (own_labels, f"dropped 36 x {LABELS}; 9 x {GOLDS}; 9 x {NOBODY}: no user is left;"),
        (own_golds, f"dropped 9 x {GOLDS}: no query is left to be scored on;"),
        (
            no_text,
            "dropped 36 x profile item with empty text or answer; 9 x query of a user with no "
            f"profile items left; 9 x {NOBODY}: no user is left;",
        ),
        (no_gold, "dropped 9 x query with empty input or gold: no query is left to be scored on;"),
    ],
)
def test_where_all_is_dropped_that_is_why(
    where: Store, tmp_path: Path, change: Callable[[dict[str, Any]], None], first: str, kind: str
) -> None:
    """And nobody is told to give more of the same, or to divide nothing otherwise."""
    file = tmp_path / "users.json"
    file.write_text(json.dumps(users(change=change)))
    line = refusal(file, split={"kind": kind})
    assert line.startswith(first)
    assert "give more users" not in line
    assert "split." not in line
    assert ("LaMP-2M takes the labels" in line) == (change in (own_labels, own_golds))


def test_labels_of_ones_own_are_set_against_the_tasks(where: Store, tmp_path: Path) -> None:
    """All 15 of the task; what was there instead may be a user's text, and lines are logged."""
    file = tmp_path / "users.json"
    file.write_text(json.dumps(users(change=own_labels)))
    line = refusal(file)
    assert line.endswith(
        "LaMP-2M takes the labels sci-fi, based on a book, comedy, action, twist ending, dystopia, "
        "dark comedy, classic, psychology, fantasy, romance, thought-provoking, social commentary, "
        "violence, true story: a task with labels of its own cannot run under this name"
    )
    assert not any(label in line for label in OWN)


def test_a_side_without_users(where: Store, tmp_path: Path) -> None:
    """All candidates' labels are unknown: the others are read, and there is nobody to train."""
    roles = {
        "base": [user("base-1", 3)],
        "anchor": users(2, own_labels),
        "few_shot": [user("few-1", 3, queries=1)],
    }
    line = refusal(write_users(tmp_path / "data", **roles))
    assert line.startswith(f"dropped 8 x {LABELS}; 2 x {GOLDS}; 2 x {NOBODY}: no anchor candidate")
    assert "good" not in line


def test_histories_that_became_too_short(where: Store, tmp_path: Path) -> None:
    """Published or not; of four items each user has three left."""
    file = tmp_path / "users.json"
    file.write_text(json.dumps(users(change=one_label)))
    first = f"dropped 9 x {LABELS}: "
    line = refusal(file, anchors={"min_items": 4})
    assert line.startswith(f"{first}{file}: no anchor candidate has anchors.min_items 4")
    assert "LaMP-2M takes the labels sci-fi" in line
    line = refusal(file, split={"kind": "published", "few_shot_items": 4})
    assert line.startswith(f"{first}split.kind published: no user with a query has 4 items")


def test_papers_that_cannot_be_asked_about(where: Store, tmp_path: Path) -> None:
    """18 authors of one paper each, in thirds: none has a second one to ask it against."""
    line = refusal(write_official(tmp_path / "data", "LaMP-1", items=1), "LaMP-1")
    assert line.startswith(
        "dropped 18 x paper without a citation, another one of its author or another author; "
        f"18 x {NOBODY}: LaMP-1: the papers name no citation"
    )


def test_nothing_to_train_the_tiny_model_on(where: Store, tmp_path: Path) -> None:
    """The only base user's one item was dropped, so the side stands empty."""
    roles = {
        "base": [user("base-1", 1)],
        "anchor": [user("anchor-1", 3)],
        "few_shot": [user("few-1", 3, queries=1)],
    }
    one_label(roles["base"][0])
    settings = config(write_users(tmp_path / "data", **roles))
    with pytest.raises(InputError) as caught:
        base_model(settings, prepared_users(settings))
    assert str(caught.value).startswith(f"dropped 1 x {LABELS}; 1 x {NOBODY}: base.model: tiny")


def test_where_nothing_was_dropped_nothing_is_said_of_it(where: Store, tmp_path: Path) -> None:
    file = tmp_path / "users.json"
    file.write_text(json.dumps(users()))
    assert refusal(file, anchors={"min_items": 5}).startswith(f"{file}: no anchor candidate")

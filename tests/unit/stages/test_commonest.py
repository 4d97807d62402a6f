"""The user's own commonest answer as a method: by hand, without a model, and found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks import answer
from tasks.config.run import resolve
from tests.unit.stages.pipeline import ROLES, noted, predictions, run
from tests.unit.stages.users import user


def tagged(name: str, *tags: str) -> dict[str, Any]:
    """A user with two queries, whose items have these tags."""
    one = user(name, len(tags), queries=2)
    for item, tag in zip(one["profile"], tags, strict=True):
        item["tag"] = tag
    return one


# Their commonest tags by hand; of equals the one that was given first.
USERS = {
    "few-0": (tagged("few-0", "comedy", "action", "action", "classic"), "action"),
    "few-1": (tagged("few-1", "romance", "action", "action", "romance"), "romance"),
    "few-2": (tagged("few-2", "sci-fi", "fantasy", "classic", "violence"), "sci-fi"),
}


def test_it_is_what_the_user_answered_most(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = noted(monkeypatch, "tasks.answer.load", lambda base, *_: base.model)
    few_shot = [one for one, _ in USERS.values()]
    cell = run(place, ROLES | {"few_shot": few_shot}, methods=["commonest"])
    wanted = {f"{name}-q{n}": tag for name, (_, tag) in USERS.items() for n in range(2)}
    assert predictions(cell, "commonest") == wanted
    assert "accuracy" in cell.compared.intervals["commonest"]
    assert loaded == []

    asked = noted(monkeypatch, "tasks.answer._answer", lambda _how, batch, *_: batch.names)
    # The prompt decides nothing of it, a user's own items do.
    run(place, ROLES | {"few_shot": few_shot}, methods=["commonest"], prompt={"history_items": 1})
    assert asked == []
    few_shot[0]["profile"][0]["tag"] = "action"
    run(place, ROLES | {"few_shot": few_shot}, methods=["commonest"])
    assert len(asked) == 1


def test_a_run_has_it_only_where_it_is_named() -> None:
    assert "commonest" not in resolve({}).methods
    assert resolve({"methods": ["base", "commonest"]}).methods == ["base", "commonest"]
    assert answer.METHODS["commonest"].uses_items

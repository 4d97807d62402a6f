"""A method is one file: one that is put beside the others is run and compared, and nothing else is
touched for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import methods
from tasks.config.run import resolve
from tasks.errors import InputError
from tasks.lora.adapters import Lora, read_peft, write_peft
from tasks.methods import METHODS
from tasks.recipes import read_recipes
from tasks.record import key_of
from tasks.results.store import store
from tests.unit.stages.pipeline import (
    ONE_MORE_ITEM,
    ROLES,
    predictions,
    run,
    stage_keys,
    stock_answers,
)

# Everybody's own LoRA is that of the anchor most similar to them, at a strength that a stage of the
# method finds once for all: one over the number of few-shot users.
NEAREST = """
from __future__ import annotations

from tasks.config.task import MethodConfig
from tasks.methods.method import Method
from tasks.results.models import Merged, Prepared, Setting, Training
from tasks.record import Result, key_of
from tasks.results.stage import stage
from tasks.stacking import Adapted, Batch


class Strength(Result):
    share: float


@stage(version=1)
def strength(users: Prepared) -> Strength:
    return Strength(share=1 / len(users.few_shot_ids))


def fit(config: MethodConfig, users: Prepared, setting: Setting, merged: Merged) -> Result:
    return strength(users)


def nearest(batch: Batch) -> Adapted:
    from tasks.lora.adapters import Lora

    merger = batch.merger
    anchors = [merger.recipes[name].anchors[0] for name in batch.names]
    adapters = {one.anchor: one.adapter for one in merger.merged.bank.members}
    keys = [key_of("nearest", 1, batch.fitted, adapters[anchor]) for anchor in anchors]

    def scaled(number):
        lora = merger.bank.lora(anchors[number])
        layers = {name: (a, batch.fitted.share * b) for name, (a, b) in lora.layers.items()}
        return Lora(layers, lora.scale), Training()

    return batch.stacked(keys, lambda numbers, _: map(scaled, numbers))


METHOD = Method("nearest", order=35, merged=True, fit=fit, adapt=nearest)
"""


@pytest.fixture
def nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The method, in a file of its own in a folder of its own."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "nearest.py").write_text(NEAREST)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "methods")])
    before = dict(METHODS)
    replace(methods._methods())
    yield
    replace(before)
    sys.modules.pop("tasks.methods.nearest")
    del methods.nearest  # type: ignore[attr-defined]


def replace(found: dict[str, Any]) -> None:
    """Other modules hold the same dictionary."""
    METHODS.clear()
    METHODS.update(found)


@pytest.mark.usefixtures("nearest")
def test_a_method_in_a_file_of_its_own_is_compared(
    place: Path, tmp_path: Path, work: dict[str, list[Any]]
) -> None:
    """Its answers are those of stock PEFT with the scaled folder of the nearest anchor."""
    assert list(METHODS).index("nearest") == list(METHODS).index("merge_only") + 1
    with stage_keys() as keys:
        cell = run(place, ROLES, methods=["base", "merge_only", "nearest"])
    assert len(keys["strength"]) == 1
    assert list(cell.answers) == ["base", "merge_only", "nearest"]
    assert cell.missing == ()
    (merging,) = cell.mergings
    assert merging.methods == ("merge_only", "nearest")
    (answers,) = cell.answers["nearest"]
    assert answers.stacked is not None
    assert not answers.merged

    recipes = read_recipes(merging.merged.recipes)
    adapters = {one.anchor: one.adapter for one in merging.merged.bank.members}
    given = predictions(cell, "nearest")
    for name, recipe in recipes.items():
        lora = read_peft(store().path(adapters[recipe.anchors[0]]))
        third = {layer: (a, b / 3) for layer, (a, b) in lora.layers.items()}
        write_peft(tmp_path / name, Lora(third, lora.scale), "base")
        prompts = [f"description: {name} film number {n} tag:" for n in (4, 5)]
        wanted = stock_answers(place, tmp_path / name, prompts)
        assert [given[f"{name}-q{n}"] for n in range(2)] == wanted
    assert given != predictions(cell, "base")

    assert cell.compared.methods == ("base", "merge_only", "nearest")
    assert "accuracy" in cell.compared.intervals["nearest"]
    assert set(cell.compared.differences["nearest"]) == {"base", "merge_only"}

    # What it made for a user is found again, and its stage's key is that of what it is given.
    for calls in work.values():
        calls.clear()
    with stage_keys() as again:
        same = run(place, ROLES, methods=["base", "merge_only", "nearest"])
    assert again == keys
    assert key_of(same) == key_of(cell)
    assert not any(work.values())
    # This user's queries are other ones, too.
    run(place, ONE_MORE_ITEM, methods=["nearest"])
    assert (work["embed"], work["answers"]) == ([["few-0"]], [["few-0"]])


def test_without_its_file_there_is_no_such_method() -> None:
    with pytest.raises(InputError, match="there is no method nearest"):
        resolve({"methods": ["nearest"]})

"""Recipes whose weights are trained: in the benchmark, found again, exported, for a new user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.lamp_task import lamp_task
from tasks.config.run import resolve
from tasks.errors import InputError
from tasks.export import Finished, export
from tasks.lora.adapters import read_peft
from tasks.lora.bank import read_bank
from tasks.personalise.personaliser import Personaliser
from tasks.plan.model import plan_model
from tasks.plan.stages import Planner
from tasks.recipes import Recipe, read_recipes, with_weights
from tasks.report.table import costs
from tasks.results.models import Training
from tasks.results.run import Cell, Run
from tasks.results.store import store
from tasks.stand_in import planned_by
from tasks.users import users_of
from tests.unit.lora.helpers import delta
from tests.unit.lora.peft_reference import merged_by_hand
from tests.unit.stages.pipeline import (
    ONE_MORE_ITEM,
    ROLES,
    noted,
    predictions,
    run,
    run_config,
    stage_keys,
)

FUSION: dict[str, Any] = {"top_m": 3, "weights": "evidence", "evidence_temperature": 8.0}
LEARNED = {"steps": 5, "learning_rate": 0.1, "penalty": 0.5}
METHODS = ["merge_only", "factors"]


def recipes_of(cell: Cell, method: str) -> dict[str, Recipe]:
    merging = cell.merging(method)
    assert merging
    return read_recipes(merging.merged.recipes)


def learned(place: Path, roles: dict[str, Any] = ROLES, **changes: Any) -> Cell:
    fusion = FUSION | {"learned": LEARNED | changes}
    return run(place, roles, methods=METHODS, fusion=fusion)


@pytest.fixture(scope="module")
def cell(place: Path) -> Cell:
    return learned(place)


def by_anchor(recipe: Recipe) -> dict[str, float]:
    return dict(zip(recipe.anchors, recipe.weights, strict=True))


def test_without_steps_they_are_the_evidences(place: Path) -> None:
    found = learned(place, steps=0)
    prior, trained = recipes_of(found, "merge_only"), recipes_of(found, "factors")
    assert prior.keys() == trained.keys()
    for name, one in prior.items():
        assert by_anchor(trained[name]) == pytest.approx(by_anchor(one), abs=1e-6)
        assert trained[name].anchors == one.anchors
    assert predictions(found, "factors") == predictions(found, "merge_only")


def test_they_are_numbers_of_their_own(cell: Cell) -> None:
    prior, trained = recipes_of(cell, "merge_only"), recipes_of(cell, "factors")
    for name, one in trained.items():
        assert {*one.anchors} == {*prior[name].anchors}
        assert [*one.weights] == sorted(one.weights, reverse=True)
        moved = [abs(by_anchor(one)[k] - w) for k, w in by_anchor(prior[name]).items()]
        # Adam moves by about the rate in each step.
        assert 0.05 < max(moved) < 5 * 0.1 + 0.01
        assert one.steps == 5
        assert one.seconds > prior[name].seconds > 0
    cost = {name: costs(cell, name) for name in METHODS}
    assert cost["factors"]["bytes_per_user"] == cost["merge_only"]["bytes_per_user"]
    assert (cost["merge_only"]["steps_per_user"], cost["factors"]["steps_per_user"]) == (0, 5)
    assert cost["factors"]["tokens_per_user"] > 0


def test_only_who_changed_is_trained_again(place: Path, cell: Cell) -> None:
    """And a rate, a number of steps, a penalty is another stage."""
    with pytest.MonkeyPatch.context() as patch:
        whom = noted(patch, "tasks.fusion.learn", lambda *given: len(given[3]))
        with stage_keys() as keys:
            same = learned(place)
        assert whom == []
        assert recipes_of(same, "factors") == recipes_of(cell, "factors")
        more = learned(place, ONE_MORE_ITEM)
        assert whom == [1]
        for name in ("few-1", "few-2"):
            assert recipes_of(more, "factors")[name] == recipes_of(cell, "factors")[name]
        for change in ({"steps": 4}, {"learning_rate": 0.2}, {"penalty": 1.0}):
            whom.clear()
            with stage_keys() as others:
                other = learned(place, **change)
            assert whom == [3]
            assert others["learned_weights"] != keys["learned_weights"]
            assert recipes_of(other, "factors") != recipes_of(cell, "factors")


def test_what_is_exported_is_merged_by_them(cell: Cell, tmp_path: Path) -> None:
    made = Run(id="one", name="one", date="", report="one", config={}, cells=(cell,))
    export(Finished(made, "LaMP-2M", "factors"), "few-1", tmp_path / "lora")
    merging = cell.merging("factors")
    assert merging
    bank, recipe = read_bank(store().path(merging.merged.bank.file)), recipes_of(cell, "factors")
    own = recipe["few-1"]
    wanted = merged_by_hand([bank.lora(one) for one in own.anchors], [*own.weights], "exact")
    found = read_peft(tmp_path / "lora")
    for layer in wanted.layers:
        assert (delta(found, layer) - delta(wanted, layer)).abs().max() < 1e-6


def test_a_new_user_gets_them_too(place: Path) -> None:
    """Of `mta` with such weights, under another name, as in the benchmark."""
    fusion = FUSION | {"weights": "learned", "learned": LEARNED}
    found = run(place, ROLES, methods=["mta"], fusion=fusion)
    users = users_of(found.users.few_shot)
    renamed = [user | {"user_id": f"other {user['user_id']}"} for user in users]
    for before, personal in zip(users, Personaliser(found)(renamed, train=False), strict=True):
        assert personal.recipe
        wanted = recipes_of(found, "mta")[before["user_id"]]
        assert by_anchor(personal.recipe) == pytest.approx(by_anchor(wanted), abs=1e-4)


def test_the_largest_stands_first() -> None:
    before = Recipe(anchors=("a", "b", "c"), similarities=(0.1, 0.2, 0.3), weights=(0.6, 0.3, 0.1))
    got = with_weights(before, (0.2, -0.1, 0.9), Training(steps=3, tokens=7, seconds=1.0))
    assert (got.anchors, got.weights) == (("c", "a", "b"), (0.9, 0.2, -0.1))
    assert (got.similarities, got.steps, got.tokens) == ((0.3, 0.1, 0.2), 3, 7)


def test_what_it_cannot_do_is_refused_in_one_line() -> None:
    for given, words in (
        ({"fusion": {"weights": "learned", "merge": "svd"}}, "no gradient through merge=svd"),
        ({"fusion": {"weights": "learned", "order": "published"}}, "not by evidence"),
        (
            {"base": {"model": "smollm2", "engine": "peft"}, "methods": ["base", "factors"]},
            "methods: factors with fusion.weights=learned needs base.engine=grouped (got 'peft')",
        ),
    ):
        with pytest.raises(InputError, match="configuration") as caught:
            resolve(given)
        assert words in str(caught.value).replace("\\", "")
    # Nothing is known of an adapter's users, but evidence is.
    adapters = {"bank": {"adapters": "a"}, "methods": ["factors"]}
    assert resolve(adapters | {"fusion": {"shortlist": None}}).methods == ["factors"]


def test_a_plan_counts_its_steps(place: Path) -> None:
    config = run_config(place, ROLES, methods=METHODS, fusion=FUSION | {"learned": LEARNED})
    planner = Planner(plan_model(config))
    with planned_by(planner):
        lamp_task(config.for_task("LaMP-2M", config.seed))
    (plan,) = planner.plans
    (work,) = [one for one in plan.rows if one.stage == "learned weights"]
    assert (work.method, work.steps, work.users) == ("factors", 5 * 3, 3)

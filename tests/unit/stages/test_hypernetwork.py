"""The network from embeddings to weights: what it can fit, and its recipes in a small run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flows.lamp_task import lamp_task
from tasks.embed import read_embeddings
from tasks.errors import InputError
from tasks.export import Finished, export
from tasks.lora.adapters import read_peft
from tasks.lora.bank import read_bank
from tasks.methods.hypernetwork import FILE, NetworkOptions, fitted
from tasks.personalise.personaliser import Personaliser
from tasks.plan.model import plan_model
from tasks.plan.stages import Planner
from tasks.recipes import read_recipes
from tasks.record import key_of
from tasks.report.table import costs
from tasks.results.run import Cell, Run
from tasks.results.store import store
from tasks.stand_in import planned_by
from tests.unit.lora.helpers import delta
from tests.unit.lora.peft_reference import merged_by_hand
from tests.unit.stages.pipeline import ONE_MORE_ITEM, ROLES, run, run_config, stage_keys

METHOD = "hypernetwork"
FUSION: dict[str, Any] = {"top_m": 2, "weights": "evidence", "evidence_temperature": 4.0}


def draw(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given_by(numbers: dict[str, torch.Tensor], points: torch.Tensor) -> torch.Tensor:
    """The formula of the module's docstring."""
    hidden = torch.tanh(points @ numbers["V"].T + numbers["c"])
    return torch.softmax(points @ numbers["W"].T + numbers["b"] + hidden @ numbers["U"].T, 1)


def test_it_fits_weights_that_are_linear_in_the_embedding() -> None:
    """Log weights are linear in x: then it is exact, of users it has not seen, too."""
    truth, points = draw(0, 3, 5), draw(1, 40, 5)
    options = NetworkOptions(hidden=0, steps=1500, learning_rate=0.05, decay=0.0)
    made = fitted(points, (points @ truth.T).softmax(1), options, 7)
    others = draw(2, 100, 5)
    wanted = (others @ truth.T).softmax(1)
    assert (given_by(made, others) - wanted).abs().max() < 1e-4
    # Up to what a softmax does not see.
    found = made["W"] - made["W"].mean(0)
    assert (found - (truth - truth.mean(0))).abs().max() < 1e-3


def test_with_hidden_units_it_fits_what_is_not_linear() -> None:
    """Exclusive or: by a linear network every user keeps even weights."""
    points = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()
    wanted = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.1, 0.9], [0.9, 0.1]]).double()
    for hidden, bound in ((0, 0.5), (8, 0.1)):
        options = NetworkOptions(hidden=hidden, steps=800, learning_rate=0.05, decay=0.0)
        found = given_by(fitted(points, wanted, options, 3), points)
        assert (found - wanted).abs().max() < bound
    assert (
        given_by(fitted(points, wanted, NetworkOptions(hidden=0), 3), points) - 0.5
    ).abs().max() < 1e-6


def test_without_steps_and_with_much_decay_weights_are_even() -> None:
    points, wanted = draw(1, 6, 4), draw(2, 6, 3).softmax(1)
    for options in (NetworkOptions(steps=0), NetworkOptions(decay=1e6)):
        found = given_by(fitted(points, wanted, options, 0), points)
        assert (found - 1 / 3).abs().max() < 1e-2


@pytest.fixture(scope="module")
def cell(place: Path) -> Cell:
    return run(place, ROLES, methods=["merge_only", METHOD], fusion=FUSION)


def test_recipes_are_the_networks(cell: Cell) -> None:
    """Two of three anchors, by its own formula on the few-shot users' vectors."""
    merging = cell.merging(METHOD)
    assert merging
    (folder,) = store().folders("network")
    numbers = load_file(folder / FILE)
    ids, points = read_embeddings(merging.embedded)["few_shot"]
    weights = given_by(numbers, torch.from_numpy(np.asarray(points, np.float64))).numpy()
    assert numbers["W"].shape == (3, points.shape[1])
    names, recipes = merging.merged.bank.names, read_recipes(merging.merged.recipes)
    for name, own in zip(ids, weights, strict=True):
        best = sorted(range(3), key=lambda k: -own[k])[:2]
        assert recipes[name].anchors == tuple(names[k] for k in best)
        assert recipes[name].weights == pytest.approx(own[best] / own[best].sum(), abs=1e-5)
    assert np.ptp(weights, axis=0).max() > 1e-3  # users differ
    usual = cell.merging("merge_only")
    assert usual
    assert key_of(usual.merged.bank) == key_of(merging.merged.bank)
    assert read_recipes(usual.merged.recipes) != recipes
    assert costs(cell, METHOD)["steps_per_user"] == 0


def test_candidates_are_fitted_to_their_evidence(place: Path, cell: Cell) -> None:
    """The users it was trained on get nearly the weights that their items' evidence says."""
    merging = cell.merging(METHOD)
    assert merging
    ids, points = read_embeddings(merging.embedded)["anchor"]
    (folder,) = store().folders("network")
    found = given_by(load_file(folder / FILE), torch.from_numpy(np.asarray(points, np.float64)))
    names = merging.merged.bank.names
    # An anchor is likeliest under its own LoRA.
    for member in merging.merged.bank.members:
        (user,) = member.members
        assert names[int(found[ids.index(user)].argmax())] == member.anchor


def test_a_users_new_item_moves_that_user_alone(place: Path, cell: Cell) -> None:
    with stage_keys() as keys:
        more = run(place, ONE_MORE_ITEM, methods=[METHOD], fusion=FUSION)
    assert "evidence" not in keys
    before, after = cell.merging(METHOD), more.merging(METHOD)
    assert before
    assert after
    old, new = (read_recipes(one.merged.recipes) for one in (before, after))
    assert {name for name in old if old[name] != new[name]} == {"few-0"}


def test_what_is_exported_is_merged_by_them(cell: Cell, tmp_path: Path) -> None:
    made = Run(id="one", name="one", date="", report="one", config={}, cells=(cell,))
    export(Finished(made, "LaMP-2M", METHOD), "few-1", tmp_path / "lora")
    merging = cell.merging(METHOD)
    assert merging
    bank = read_bank(store().path(merging.merged.bank.file))
    own = read_recipes(merging.merged.recipes)["few-1"]
    wanted = merged_by_hand([bank.lora(one) for one in own.anchors], [*own.weights], "exact")
    found = read_peft(tmp_path / "lora")
    for layer in wanted.layers:
        assert (delta(found, layer) - delta(wanted, layer)).abs().max() < 1e-6
    with pytest.raises(InputError, match=f"--method {METHOD}: makes its LoRAs in a way that new"):
        Personaliser(cell, METHOD)


def test_a_plan_goes_on_with_the_usual_recipes(place: Path) -> None:
    config = run_config(place, ROLES, methods=["merge_only", METHOD], fusion=FUSION)
    planner = Planner(plan_model(config))
    with planned_by(planner):
        lamp_task(config.for_task("LaMP-2M", config.seed))
    (plan,) = planner.plans
    assert {"network: its work is not known and not counted"} <= {*plan.notes}
    assert {work.method for work in plan.rows if work.stage == "scoring"} == {"merge_only", METHOD}

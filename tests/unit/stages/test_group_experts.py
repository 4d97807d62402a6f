"""Groups' LoRAs over what all users share: against stock PEFT, and in a small run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.bank import META as META_FILE
from tasks.config.run import resolve
from tasks.errors import InputError
from tasks.export import Finished, export
from tasks.lora.adapters import Lora, read_peft
from tasks.lora.bank import read_bank
from tasks.lora.base import load_base
from tasks.lora.batches import Encoded, encode
from tasks.lora.grouped import fresh, shapes_of
from tasks.lora.merge import concatenate
from tasks.lora.train import epochs
from tasks.methods import group_experts
from tasks.model import training_from
from tasks.personalise.personaliser import Personaliser
from tasks.recipes import read_recipes
from tasks.record import derive_seed, key_of
from tasks.results.run import Cell, Run
from tasks.results.store import store
from tasks.tracking.entries import parts
from tasks.users import users_of
from tests.unit.lora import peft_reference
from tests.unit.lora.helpers import delta
from tests.unit.lora.peft_reference import merged_by_hand
from tests.unit.stages.pipeline import ROLES, run, stage_keys

METHOD = "group_experts"
FUSION: dict[str, Any] = {"top_m": 2, "weights": "evidence", "evidence_temperature": 4.0}
# Small: AdamW turns rounding of tiny gradients into steps of up to the rate.
META = {"rank": 3, "alpha": 3.0, "learning_rate": 1e-3, "epochs": 2, "batch_size": 2,
        "accumulation": 1}  # fmt: skip


@pytest.fixture(scope="module")
def cell(place: Path) -> Cell:
    return run(place, ROLES, methods=["mta", METHOD], fusion=FUSION, meta_lora=META)


def items_of(base: Any, users: list[dict[str, Any]]) -> list[Encoded]:
    asked = [(item["description"], item["tag"]) for user in users for item in user["profile"]]
    return [encode(base, f"description: {text} tag:", tag) for text, tag in asked]


def by_peft(place: Path, cell: Cell, name: str, samples: list[Encoded], under: Lora | None) -> Lora:
    """Trained by stock PEFT, the LoRA below as a second, frozen adapter."""
    base = load_base(place / "model", max_tokens=64, device="cpu")
    options, seed = training_from(cell.config.meta_lora), derive_seed(0, "experts", name)
    shapes = shapes_of(base.model, "all-linear", 3)
    start = shapes.loras(fresh(shapes, [seed]), 1.0)[0]
    steps = list(epochs(len(samples), options, seed))
    lora, _ = peft_reference.train(base.model, under, start, samples, steps, options, None)
    return lora


def test_a_member_is_what_all_share_and_a_group(place: Path, cell: Cell) -> None:
    base = load_base(place / "model", max_tokens=64, device="cpu")
    assert cell.config.seed == 0
    population = by_peft(place, cell, "population", items_of(base, ROLES["base"]), None)
    merging, usual = cell.merging(METHOD), cell.merging("mta")
    assert merging
    assert usual
    bank = read_bank(store().path(merging.merged.bank.file))
    assert [*bank.ids] == merging.merged.bank.names == usual.merged.bank.names
    assert (bank.rank, bank.scale) == (6, 1.0)
    users = {one["user_id"]: one for one in ROLES["anchor"]}
    for member in merging.merged.bank.members:
        samples = items_of(base, [users[name] for name in member.members])
        group = by_peft(place, cell, member.anchor, samples, population)
        wanted, found = concatenate(population, group), bank.lora(member.anchor)
        folder = read_peft(store().path(member.adapter))
        for layer in wanted.layers:
            moved = delta(population, layer).norm(), delta(group, layer).norm()
            assert min(moved) > 1e-4
            assert (delta(found, layer) - delta(wanted, layer)).norm() < 1e-2 * min(moved)
            assert torch.equal(delta(folder, layer), delta(found, layer))


def test_each_member_is_an_anchor_in_mlflow(cell: Cell) -> None:
    """Beside the usual bank's; a member's stored folder says whose it is."""
    made = Run(
        id="one",
        name="one",
        date="2026-03-04T05:06:00",
        report="one",
        config={"preset": "embedded"},
        cells=(cell,),
    )
    merging, usual = cell.merging(METHOD), cell.merging("mta")
    assert merging
    assert usual
    adapters = [one.adapter for both in (usual, merging) for one in both.merged.bank.members]
    entries = [one for one in parts(made, [[]]) if one.tags["kind"] == "anchor"]
    assert [one.files for one in entries] == [[(adapter, None)] for adapter in adapters]
    for member in merging.merged.bank.members:
        about = json.loads((store().root / member.adapter.folder / META_FILE).read_text())
        assert (about["anchor"], about["members"]) == (member.anchor, [*member.members])


def test_the_rest_is_as_with_any_bank(cell: Cell, tmp_path: Path) -> None:
    """Exported: the population, the mixture of groups, and the user's own on top."""
    made = Run(id="one", name="one", date="", report="one", config={}, cells=(cell,))
    export(Finished(made, "LaMP-2M", METHOD), "few-1", tmp_path / "lora")
    merging, (batch,) = cell.merging(METHOD), cell.answers[METHOD]
    assert merging
    assert batch.stacked
    bank = read_bank(store().path(merging.merged.bank.file))
    recipe = read_recipes(merging.merged.recipes)["few-1"]
    members = [bank.lora(one) for one in recipe.anchors]
    merged = merged_by_hand(members, [*recipe.weights], "exact")
    wanted = concatenate(merged, read_bank(store().path(batch.stacked)).lora("few-1"))
    found = read_peft(tmp_path / "lora")
    for layer in wanted.layers:
        assert (delta(found, layer) - delta(wanted, layer)).abs().max() < 1e-6
    assert 0 < recipe.weights[1] < recipe.weights[0] < 1


def test_a_new_user_is_served_from_it(cell: Cell) -> None:
    """By another name, as in the benchmark."""
    merging, users = cell.merging(METHOD), users_of(cell.users.few_shot)
    assert merging
    wanted = read_recipes(merging.merged.recipes)
    renamed = [user | {"user_id": f"other {user['user_id']}"} for user in users]
    made = Personaliser(cell, METHOD)(renamed, train=False)
    for user, personal in zip(users, made, strict=True):
        assert personal.recipe
        assert personal.recipe.anchors == wanted[user["user_id"]].anchors
        assert personal.recipe.weights == pytest.approx(wanted[user["user_id"]].weights, abs=1e-4)


def test_items_are_drawn_by_the_seed(
    place: Path, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer items of base users are another bank, and another key; the same are the same."""
    keys, banks = [], []
    for items in (1000, 4, 4):
        monkeypatch.setattr(group_experts, "ITEMS", items)
        with stage_keys() as found:
            merging = run(place, ROLES, methods=[METHOD], fusion=FUSION, meta_lora=META).merging(
                METHOD
            )
        assert merging
        keys.append(found["experts"])
        banks.append(key_of(merging.merged.bank))
    before = cell.merging(METHOD)
    assert before
    assert banks[0] == key_of(before.merged.bank)
    assert (keys[0] != keys[1], keys[1] == keys[2]) == (True, True)
    assert (banks[0] != banks[1], banks[1] == banks[2]) == (True, True)


def test_a_bank_of_adapters_is_refused() -> None:
    given = {"bank": {"adapters": "a"}, "methods": [METHOD], "fusion": {"weights": "evidence"}}
    with pytest.raises(InputError, match="group_experts trains a bank of its own; leave it out"):
        resolve(given)

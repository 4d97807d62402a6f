"""Evidence on a tiny model against stock PEFT, and small runs that weigh by it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tasks.fusion import EVIDENCE_FILE
from tasks.lora.adapters import read_peft
from tasks.lora.base import load_base
from tasks.lora.batches import encode
from tasks.recipes import Recipe, read_recipes
from tasks.record import key_of
from tasks.results.models import Merged
from tasks.results.run import Cell
from tasks.results.store import store
from tests.unit.lora.peft_reference import attached, likelihood
from tests.unit.stages.pipeline import OPTIONS, ROLES, merging, noted, run
from tests.unit.stages.users import user

EVIDENCE = {"weights": "evidence", "top_m": 2, "evidence_temperature": 2.0}
COSINE = {"weights": "cosine", "top_m": 2}
NAMES = ["few-0", "few-1", "few-2"]


@dataclass
class Evidence:
    """log_likelihoods [U, K], NaN off the shortlist; seconds per user."""

    log_likelihoods: np.ndarray
    seconds: list[float]


def weigh(place: Path, roles: dict[str, Any], **given: Any) -> tuple[Cell, Evidence]:
    """A small run, and the evidence that it weighed by."""
    with pytest.MonkeyPatch.context() as patch:
        found = noted(patch, "tasks.fusion.fusion", lambda *given: given[3])
        cell = run(place, roles, **given)
    (evidence,) = found
    table = pl.read_parquet(store().path(evidence.table))
    assert table["user_id"].to_list() == NAMES
    likelihoods = np.array(table["log_likelihoods"].to_list(), dtype=float)
    return cell, Evidence(likelihoods, table["seconds"].to_list())


@pytest.fixture(scope="module")
def weighed(place: Path) -> tuple[Cell, Evidence]:
    return weigh(place, ROLES, fusion=EVIDENCE)


def merged_of(cell: Cell) -> Merged:
    found = cell.merging("mta")
    assert found is not None
    return found.merged


def recipes_of(cell: Cell) -> dict[str, Recipe]:
    return read_recipes(merged_of(cell).recipes)


def by_peft(place: Path, cell: Cell) -> dict[str, list[float]]:
    """Sum over the user's items of log p(answer | prompt), under each anchor's own folder."""
    base = load_base(place / "model", max_tokens=64, device="cpu")
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for member in merged_of(cell).bank.members:
        stock = attached(base.model, own=read_peft(store().path(member.adapter)))
        for one in ROLES["few_shot"]:
            samples = [
                encode(base, f"description: {item['description']} tag:", item["tag"])
                for item in one["profile"]
            ]
            found[one["user_id"]].append(sum(likelihood(stock, item) for item in samples))
    return found


def test_evidence_is_that_of_stock_peft(place: Path, weighed: tuple[Cell, Evidence]) -> None:
    cell, evidence = weighed
    wanted = by_peft(place, cell)
    assert evidence.log_likelihoods.shape == (3, 3)
    for own, name in zip(evidence.log_likelihoods, NAMES, strict=True):
        assert own == pytest.approx(wanted[name], rel=1e-5)
    # Anchors differ by far more than that.
    assert min(np.ptp(own) for own in wanted.values()) > 0.1
    (folder,) = store().folders("evidence")
    table = pl.read_parquet(folder / EVIDENCE_FILE)
    assert table["user_id"].to_list() == NAMES
    assert table["log_likelihoods"].to_list() == evidence.log_likelihoods.tolist()


def test_recipes_are_the_softmax_of_the_evidence(weighed: tuple[Cell, Evidence]) -> None:
    """The two largest of three, at a temperature of 2."""
    cell, evidence = weighed
    ids, recipes = merged_of(cell).bank.names, recipes_of(cell)
    for name, own in zip(NAMES, evidence.log_likelihoods, strict=True):
        best = sorted(range(3), key=lambda k: -own[k])[:2]
        first = 1 / (1 + math.exp((own[best[1]] - own[best[0]]) / 2.0))
        assert recipes[name].anchors == tuple(ids[k] for k in best)
        assert recipes[name].weights == pytest.approx([first, 1 - first])


def test_the_way_of_weighing_trains_no_anchor_again(
    place: Path, weighed: tuple[Cell, Evidence], work: dict[str, list[Any]]
) -> None:
    cell, _ = weighed
    by_cosine = merging(place, ROLES, fusion=COSINE).merged
    assert key_of(by_cosine.bank) == key_of(merged_of(cell).bank)
    assert key_of(by_cosine.recipes) != key_of(merged_of(cell).recipes)
    again = run(place, ROLES, fusion=EVIDENCE)
    assert key_of(again) == key_of(cell)
    hotter = merging(place, ROLES, fusion=EVIDENCE | {"evidence_temperature": 4.0}).merged
    assert key_of(hotter.recipes) != key_of(merged_of(cell).recipes)
    assert not any(work.values())


def test_one_users_new_item_is_one_users_evidence(
    place: Path, weighed: tuple[Cell, Evidence], work: dict[str, list[Any]]
) -> None:
    changed_user = user("few-1", 5, queries=2) | {"query": ROLES["few_shot"][1]["query"]}
    few_shot = [ROLES["few_shot"][0], changed_user, ROLES["few_shot"][2]]
    _, after = weigh(place, ROLES | {"few_shot": few_shot}, fusion=EVIDENCE)
    assert (work["meta_lora"], work["evidence"], work["stacking"]) == ([], [1], [1])
    _, before = weighed
    for row in (0, 2):
        assert np.array_equal(after.log_likelihoods[row], before.log_likelihoods[row])
        assert after.seconds[row] == before.seconds[row]
    # One more item is one more factor below 1.
    assert (after.log_likelihoods[1] < before.log_likelihoods[1]).all()


def test_off_the_shortlist_there_is_no_evidence(
    place: Path, weighed: tuple[Cell, Evidence]
) -> None:
    """The two most similar anchors of three are asked: those of the recipes by cosine."""
    near, short = weigh(place, ROLES, fusion=EVIDENCE | {"shortlist": 2, "top_m": 3})
    cosine = read_recipes(merging(place, ROLES, fusion=COSINE).merged.recipes)
    ids, recipes = merged_of(near).bank.names, recipes_of(near)
    for row, name in enumerate(NAMES):
        own, full = short.log_likelihoods[row], weighed[1].log_likelihoods[row]
        asked = {anchor for anchor, one in zip(ids, own, strict=True) if not math.isnan(one)}
        assert asked == set(cosine[name].anchors)
        for value, wanted in zip(own, full, strict=True):
            # Rounded to four decimals, after the last bits that company moves.
            assert math.isnan(value) or value == pytest.approx(wanted, abs=2e-4)
        # Three members, the third without weight: nothing of it is in the merged LoRA.
        assert set(recipes[name].anchors[:2]) == asked
        assert recipes[name].weights[2] == 0.0
        assert sum(recipes[name].weights) == pytest.approx(1)
    scored = near.scored("mta")
    assert scored is not None
    assert scored.queries == 6


def test_a_shortlist_as_long_as_the_bank_is_none(
    place: Path, weighed: tuple[Cell, Evidence], work: dict[str, list[Any]]
) -> None:
    cell, evidence = weighed
    long, same = weigh(place, ROLES, fusion=EVIDENCE | {"shortlist": 3})
    assert work["evidence"] == []
    assert np.array_equal(same.log_likelihoods, evidence.log_likelihoods)
    assert key_of(merged_of(long)) == key_of(merged_of(cell))


def test_anchors_trained_otherwise_are_weighed_anew(
    place: Path, weighed: tuple[Cell, Evidence], work: dict[str, list[Any]]
) -> None:
    """The same anchors and users, so recipes by cosine stay."""
    shorter = OPTIONS["meta_lora"] | {"epochs": 1}
    for fusion, asked, same in ((EVIDENCE, [3], False), (COSINE, [], True)):
        before = merging(place, ROLES, fusion=fusion).merged
        work["evidence"].clear()
        after = merging(place, ROLES, fusion=fusion, meta_lora=shorter).merged
        assert after.bank.names == before.bank.names == merged_of(weighed[0]).bank.names
        assert work["evidence"] == asked
        assert (key_of(after.recipes) == key_of(before.recipes)) == same

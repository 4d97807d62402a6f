"""`tasks.export` of any method and seed of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import InputError
from tasks.export import Finished, export
from tasks.lora.adapters import Lora, read_peft
from tasks.lora.bank import read_bank
from tasks.lora.merge import concatenate, merge
from tasks.recipes import read_recipes
from tasks.report.files import write_run
from tasks.results.run import Cell, Run
from tasks.results.store import store
from tasks.tools.main import main
from tests.unit.lora.helpers import delta
from tests.unit.lora.peft_reference import largest_difference, merged_by_hand
from tests.unit.stages.pipeline import LORA, ROLES, run

FUSION = {"top_m": 2, "weights": "cosine", "merge": "exact"}
OPPU = {"rank": 3, "alpha": 6.0, **LORA}
METHODS = ["oppu", "merge_only", "stack_only", "mta"]


def published(cell: Cell) -> Cell:
    """With a method that merges the bank of `mta` by factors, and has its stacked LoRAs."""
    (own,) = cell.mergings
    merged = own.merged.model_copy(update={"how": "factors"})
    by_factors = own.model_copy(update={"methods": ("mta_published",), "merged": merged})
    answers = cell.answers | {"mta_published": cell.answers["mta"]}
    return cell.model_copy(update={"answers": answers, "mergings": (own, by_factors)})


@pytest.fixture(scope="module")
def saved(place: Path) -> Run:
    """A run of two seeds and five methods, written down; mta_published merges mta's bank."""
    cells = []
    for seed in (7, 8):
        cell = run(place, ROLES, methods=METHODS, oppu=OPPU, seed=seed, fusion=FUSION)
        cells.append(published(cell))
    about = {"name": "brave-owl", "date": "2026-11-28 07:00", "report": "brave-owl"}
    made = Run(id="both", config={}, cells=tuple(cells), **about)
    write_run(made)
    return made


def cell_of(saved: Run, seed: int) -> Cell:
    cell = saved.cell("LaMP-2M", seed)
    assert cell
    return cell


def shard(saved: Run, seed: int, method: str, user: str) -> Lora:
    (batch,) = cell_of(saved, seed).answers[method]
    assert batch.stacked
    return read_bank(store().path(batch.stacked)).lora(user)


def members(
    saved: Run, seed: int, user: str, method: str = "merge_only"
) -> tuple[list[Lora], list[float]]:
    own = cell_of(saved, seed).merging(method)
    assert own
    bank = read_bank(store().path(own.merged.bank.file))
    recipe = read_recipes(own.merged.recipes)[user]
    return [bank.lora(anchor) for anchor in recipe.anchors], list(recipe.weights)


def same_update(left: Lora, right: Lora) -> bool:
    return left.layers.keys() == right.layers.keys() and all(
        (delta(left, layer) - delta(right, layer)).abs().max() < 1e-6 for layer in left.layers
    )


@pytest.mark.parametrize("seed", [7, 8, None])
def test_every_method_by_hand(saved: Run, tmp_path: Path, seed: int | None) -> None:
    """What is exported is the update that the method's parts add up to; no seed is the first."""
    chosen = 7 if seed is None else seed
    loras, weights = members(saved, chosen, "few-1")
    exact = merged_by_hand(loras, weights, "exact")
    factors = merged_by_hand(loras, weights, "factors")
    wanted = {
        "merge_only": exact,
        "mta": concatenate(exact, shard(saved, chosen, "mta", "few-1")),
        # The configuration of the run merges `exact`, the method by factors.
        "mta_published": concatenate(factors, shard(saved, chosen, "mta", "few-1")),
        "oppu": shard(saved, chosen, "oppu", "few-1"),
        "stack_only": shard(saved, chosen, "stack_only", "few-1"),
    }
    found = {}
    for method, lora in wanted.items():
        export(Finished(saved, "LaMP-2M", method, seed), "few-1", tmp_path / method)
        found[method] = read_peft(tmp_path / method)
        assert same_update(found[method], lora), method
        about = json.loads((tmp_path / method / "mta.json").read_text())
        assert (about["method"], about["user"], about["lamp_task"]) == (method, "few-1", "LaMP-2M")
        assert about["prompt"] == "description: <text> tag:"
    assert found["oppu"].rank == 3
    names = list(found)
    for n, one in enumerate(names):
        assert not any(same_update(found[one], found[other]) for other in names[n + 1 :])


def test_seeds_differ(saved: Run) -> None:
    one, other = (shard(saved, seed, "oppu", "few-1") for seed in (7, 8))
    assert largest_difference(one, other) > 1e-2
    assert merge([one], [1.0], "exact").rank == 3


def test_the_command(saved: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "lora"
    given = ["export", "--user", "few-2", "--to", str(target), "--method", "oppu", "--seed", "8"]
    assert main(given) == 0
    out = capsys.readouterr().out
    told = f"{target}: the LoRA of few-2 by oppu for LaMP-2M, from the run brave-owl of 2026-11-28"
    assert told in out
    assert largest_difference(read_peft(target), shard(saved, 8, "oppu", "few-2")) == 0.0
    # By default mta of the first seed.
    assert main(["export", "--user", "few-2", "--to", str(tmp_path / "default")]) == 0
    export(Finished(saved, "LaMP-2M", "mta", 7), "few-2", tmp_path / "by name")
    assert same_update(read_peft(tmp_path / "default"), read_peft(tmp_path / "by name"))
    capsys.readouterr()
    for more, words in (
        (["--seed", "9"], "mta: --seed 9: not in this run; it has 7, 8"),
        (["--lamp-task", "LaMP-3"], "mta: --lamp-task LaMP-3: not in this run; it has LaMP-2M"),
        (["--method", "rag"], "mta: --method rag: not in this run; it has oppu, merge_only, "),
        (["--run", "absent"], "--run absent: neither a run nor a file of one; the last are brave"),
        (["--user", "nobody"], "--user nobody: no few-shot user of the run brave-owl of 2026-11"),
    ):
        again = ["export", "--user", "few-2", "--to", str(tmp_path / "none"), *more]
        assert main(again) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("how", ["factors", "exact"])
def test_the_way_of_merging_is_that_of_the_run(place: Path, tmp_path: Path, how: str) -> None:
    """The LaMP task's own `fusion.merge` wins over the run's, by hand; another task's does not."""
    own = {"factors": {"LaMP-2M": {"fusion": {"merge": "factors"}}},
           "exact": {"LaMP-3": {"fusion": {"merge": "factors"}}}}  # fmt: skip
    cell = run(place, ROLES, methods=["mta"], fusion=FUSION, seed=7, per_task=own[how])
    made = Run(id="one", name="one", date="", report="one", config={}, cells=(cell,))
    export(Finished(made, "LaMP-2M", "mta"), "few-1", tmp_path / "lora")
    loras, weights = members(made, 7, "few-1", "mta")
    merged = merged_by_hand(loras, weights, how)
    wanted = concatenate(merged, shard(made, 7, "mta", "few-1"))
    found = read_peft(tmp_path / "lora")
    assert found.rank == wanted.rank == {"factors": 5, "exact": 8}[how]
    assert same_update(found, wanted)


@pytest.mark.parametrize("method", ["mta", "oppu"])
def test_a_user_whose_batch_failed_is_not_half_exported(
    saved: Run, tmp_path: Path, method: Any
) -> None:
    """A run that is incomplete lists the batches that are there; the merged LoRA alone is not
    what the method gives."""
    cell = cell_of(saved, 7)
    others = [one.model_copy(update={"users": ("few-0", "few-2")}) for one in cell.answers[method]]
    cell = cell.model_copy(update={"answers": cell.answers | {method: tuple(others)}})
    broken = saved.model_copy(update={"cells": (cell,)})
    with pytest.raises(InputError, match=r"--user few-1: the run trained no LoRA of this user"):
        export(Finished(broken, "LaMP-2M", method), "few-1", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_stays(saved: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--to {tmp_path}: is there already"):
        export(Finished(saved, "LaMP-2M", "mta"), "few-0", tmp_path)
    assert list(tmp_path.iterdir()) == []

"""What the report says, gathered from results in a store: two seeds, two methods, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tasks.compare import DRAWS_FILE
from tasks.config import resolve
from tasks.report.data import COSTS, report_data
from tasks.store.artifacts import Store
from tasks.store.pieces import digest
from tests.unit.stages.test_answers import scored

METHODS = ["mta", "base", "rag"]
COUNTS = {"base_users": 1, "few_shot_users": 2}


def cell(where: Store, base: float, mta: float) -> dict[str, Any]:
    """A `compare` result: accuracy as given, and 101 draws from .05 below it to .05 above.

    That of rag lies in the middle of base and mta.
    """
    spread = np.linspace(-0.05, 0.05, 101)[:, None]
    # What the draws came from is used only where two cells share users.
    tensors: dict[str, Any] = {"groups": np.arange(4), "counts": np.full(4, 2.0)}
    tensors |= {"sums": np.zeros((4, 3, 1)), "totals": np.zeros((3, 1))}
    for name in ("accuracy", "score"):
        tensors[f"points.{name}"] = np.array([mta, base, (base + mta) / 2])
        tensors[f"draws.{name}"] = tensors[f"points.{name}"] + spread

    def make(out: Path) -> dict[str, Any]:
        save_file(tensors, out / DRAWS_FILE)
        about = {"lamp_task": "LaMP-2M", "sample": f"world {base} {mta}", "rules": "lamp"}
        return {**about, "methods": METHODS, "groups": 4, "queries": 8}

    piece = where.get("compare", digest([base, mta]), make)
    return {"ref": piece.ref, "value": piece.value}


def summary(
    where: Store, seed: int, base: float, mta: float, curve: dict[int, Any]
) -> dict[str, Any]:
    audit = {
        "labels": {"golds": None},
        "groups": {"few_shot": {"1": 2}},
        "queries": {"few_shot": {"asked": 8}},
        "duplicates": {},
        "profile_lengths": {},
    }
    return {
        "lamp_task": "LaMP-2M",
        "seed": seed,
        "compared": cell(where, base, mta),
        "curve": curve,
        "scores": {
            "mta": scored(where, ["comedy", "action"]),
            "base": scored(where, ["comedy", "no label"] if seed == 3 else ["no", "none"]),
            "rag": scored(where, ["comedy", "action" if seed == 3 else "comedy"]),
        },
        "banks": {},
        "bank_of": {},
        "prepared": {
            "ref": where.get("prepare", digest(seed), lambda _out: {}).ref,
            "value": {"counts": COUNTS, "dropped": {}, "audit": audit, "authors": {"base": ["me"]}},
        },
    }


@pytest.fixture
def data(where: Store) -> dict[str, Any]:
    config = resolve(
        {"seeds": [3, 5], "items_curve": [2, 4], "split": {"few_shot_items": 6},
         "lamp_tasks": ["LaMP-2M"], "methods": METHODS}
    )  # fmt: skip
    fewer = {"ref": cell(where, 0.125, 0.375)["ref"]}
    # Seed 5 has nothing at 4 items.
    summaries = [
        summary(where, 3, 0.5, 0.625, {2: fewer, 4: fewer}),
        summary(where, 5, 0.25, 0.75, {2: fewer, 4: None}),
    ]
    mean = {"value": {"cells": 2, "groups": 8, "queries": 16, "intervals": {}}}
    table = [
        {"lamp_task": "LaMP-2M", "seed": seed, "method": "mta", **dict.fromkeys(COSTS, cost)}
        for seed, cost in ((3, 1.0), (5, 2.0))
    ]
    table.append({"lamp_task": "LaMP-2M", "seed": 3, "method": "bayes"})
    about = {"name": "run", "date": "today"}
    said: dict[str, Any] = {"notes": ["few"], "missing": [], "since": None}
    return report_data(config, about, summaries, mean, table, said, where)


def test_seeds_are_averaged_and_stand_alone(data: dict[str, Any]) -> None:
    assert data["methods"] == ["base", "rag", "mta"]
    assert data["references"] == []
    scores = {
        table["seed"]: {
            method: own["accuracy"]["point"]
            for method, own in table["cells"]["LaMP-2M"]["scores"].items()
        }
        for table in data["tables"]
    }
    assert scores == {
        None: {"mta": 0.6875, "base": 0.375, "rag": 0.53125},
        3: {"mta": 0.625, "base": 0.5, "rag": 0.5625},
        5: {"mta": 0.75, "base": 0.25, "rag": 0.5},
    }
    first = data["tables"][0]["cells"]["LaMP-2M"]
    assert (first["primary"], first["groups"], first["queries"]) == ("accuracy", 8, 16)
    # The 2.5th percentile of 101 even draws is 2.5 steps of .001 from the lowest.
    own = first["scores"]["mta"]["accuracy"]
    assert (own["lo"], own["hi"]) == (pytest.approx(0.64), pytest.approx(0.735))


def test_differences_are_of_all_pairs(data: dict[str, Any]) -> None:
    """All draws move alike, so a difference is the same in each: it holds."""
    for scope in ("mean", "LaMP-2M"):
        found = {
            (method, opponent): tuple(one.values())
            for method, own in data["differences"][scope].items()
            for opponent, one in own.items()
        }
        half, whole = 0.15625, 0.3125
        assert found == {
            pair: (value, value, value, True)
            for pair, value in {
                ("mta", "base"): whole, ("mta", "rag"): half, ("rag", "base"): half,
                ("base", "mta"): -whole, ("rag", "mta"): -half, ("base", "rag"): -half,
            }.items()
        }  # fmt: skip


def test_what_was_answered(data: dict[str, Any]) -> None:
    """No label: of base one of two answers with seed 3, both with seed 5."""
    shares = {one["seed"]: one["cells"]["LaMP-2M"]["no_label"] for one in data["tables"]}
    assert shares == {
        seed: {"mta": 0.0, "base": share, "rag": 0.0}
        for seed, share in {None: 0.75, 3: 0.5, 5: 1.0}.items()
    }
    examples = {(one["seed"], one["method"]): one["examples"] for one in data["no_label"]}
    assert examples[3, "base"] == [["q1", "no label"]]
    assert examples[5, "mta"] == []
    # mta and rag answer alike with seed 3 only.
    assert data["identical"] == {"mean": [], "LaMP-2M": []}


def test_the_curve_has_what_all_seeds_have_and_the_run_itself(data: dict[str, Any]) -> None:
    points = {one["items"]: one["point"] for one in data["curve"]["LaMP-2M"]["mta"]}
    assert points == {2: 0.375, 6: 0.6875}


def test_costs_are_means_of_who_has_any(data: dict[str, Any]) -> None:
    expected = {"mta": dict.fromkeys(COSTS, 1.5)}
    assert data["costs"] == {"mean": expected, "LaMP-2M": expected}


def test_it_is_json_and_names_nobody(data: dict[str, Any]) -> None:
    text = json.dumps(data, allow_nan=False)
    assert '"me"' not in text
    assert [one["counts"] for one in data["audit"]] == [COUNTS, COUNTS]
    assert data["about"]["seeds"] == [3, 5]
    assert data["notes"] == ["few"]

"""What the report says, gathered from results in a store: two seeds, two methods, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tasks.compare import DRAWS_FILE
from tasks.config.run import resolve
from tasks.report.data import COSTS, report_data
from tasks.report.html import report_html
from tasks.report.page_data import ReportData
from tasks.results.models import Compared
from tasks.results.run import Cell
from tasks.results.store import Store, store
from tests.unit.report.cells import answered, cell, compared, run, users

AUTHOR = "somebody"
METHODS = ["mta", "base", "rag"]
COUNTS = {
    "base_users": 17, "anchor_candidates": 3, "few_shot_users": 2, "few_shot_groups": 2,
    "queries": 8,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "seeds": [3, 5], "items_curve": [2, 4], "split": {"few_shot_items": 6},
    "lamp_tasks": ["LaMP-2M"], "methods": METHODS,
}  # fmt: skip


AUDIT = {
    "labels": {"golds": None},
    "groups": {"few_shot": {"1": 2}},
    "queries": {"few_shot": {"asked": 8, "text": {"any": 0}, "text_and_answer": {"any": 0}}},
    "duplicates": {},
    "profile_lengths": {"few_shot": None},
}


def drawn(base: float, mta: float, /, **answers: list[str]) -> Compared:
    """A comparison: accuracy as given, and 101 draws from .05 below it to .05 above.

    That of rag lies in the middle of base and mta.
    """
    spread = np.linspace(-0.05, 0.05, 101)[:, None]
    # What the draws came from is used only where two cells share users.
    tensors: dict[str, Any] = {"groups": np.arange(4), "counts": np.full(4, 2.0)}
    tensors |= {"sums": np.zeros((4, 3, 1)), "totals": np.zeros((3, 1))}
    for name in ("accuracy", "score"):
        tensors[f"points.{name}"] = np.array([mta, base, (base + mta) / 2])
        tensors[f"draws.{name}"] = tensors[f"points.{name}"] + spread
    with store().new("compare") as folder:
        save_file(tensors, folder.path / DRAWS_FILE)
    about = {"sample": f"world {base} {mta}", "draws": folder.file(DRAWS_FILE)}
    about |= {"methods": tuple(METHODS), "groups": 4, "queries": 8}
    found = {method: answered(said) for method, said in answers.items()}
    return compared("LaMP-2M", **found).model_copy(update=about)


def scored(seed: int, base: float, mta: float, curve: dict[int, Compared]) -> Cell:
    said = {
        "mta": ["comedy", "action"],
        "base": ["comedy", "no label"] if seed == 3 else ["no", "none"],
        "rag": ["comedy", "action" if seed == 3 else "comedy"],
    }
    named = {"base": [AUTHOR]}
    return cell(
        drawn(base, mta, **said),
        seed,
        CONFIG,
        curve=curve,
        users=users(counts=COUNTS, audit=AUDIT, authors=named),
    )


@pytest.fixture
def data(where: Store) -> ReportData:
    fewer = drawn(0.125, 0.375)
    # Seed 5 has nothing at 4 items.
    cells = [
        scored(3, 0.5, 0.625, {2: fewer, 4: fewer}),
        scored(5, 0.25, 0.75, {2: fewer}),
    ]
    mean = compared().model_copy(update={"task": None, "cells": 2, "groups": 8, "queries": 16})
    table: list[dict[str, Any]] = [
        {"lamp_task": "LaMP-2M", "seed": seed, "method": "mta", **dict.fromkeys(COSTS, cost)}
        for seed, cost in ((3, 1.0), (5, 2.0))
    ]
    table.append({"lamp_task": "LaMP-2M", "seed": 3, "method": "bayes"})
    config = resolve(CONFIG).model_dump(mode="json")
    return report_data(run(*cells, overall=mean, config=config), table, ["few"], None)


def test_seeds_are_averaged_and_stand_alone(data: ReportData) -> None:
    assert data.methods == ["base", "rag", "mta"]
    assert data.references == []
    scores = {
        table.seed: {
            method: own["accuracy"].point for method, own in table.cells["LaMP-2M"].scores.items()
        }
        for table in data.tables
    }
    assert scores == {
        None: {"mta": 0.6875, "base": 0.375, "rag": 0.53125},
        3: {"mta": 0.625, "base": 0.5, "rag": 0.5625},
        5: {"mta": 0.75, "base": 0.25, "rag": 0.5},
    }
    first = data.tables[0].cells["LaMP-2M"]
    assert (first.primary, first.groups, first.queries) == ("accuracy", 8, 16)
    # The 2.5th percentile of 101 even draws is 2.5 steps of .001 from the lowest.
    own = first.scores["mta"]["accuracy"]
    assert (own.lo, own.hi) == (pytest.approx(0.64), pytest.approx(0.735))


def test_differences_are_of_all_pairs(data: ReportData) -> None:
    """All draws move alike, so a difference is the same in each: it holds."""
    for scope in ("mean", "LaMP-2M"):
        found = {
            (method, opponent): (one.point, one.lo, one.hi, one.holds)
            for method, own in data.differences[scope].items()
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


def test_what_was_answered(data: ReportData) -> None:
    """No label: of base one of two answers with seed 3, both with seed 5."""
    shares = {one.seed: one.cells["LaMP-2M"].no_label for one in data.tables}
    assert shares == {
        seed: {"mta": 0.0, "base": share, "rag": 0.0}
        for seed, share in {None: 0.75, 3: 0.5, 5: 1.0}.items()
    }
    examples = {(one.cell, one.method): one.examples for one in data.no_label}
    assert examples["LaMP-2M seed 3", "base"] == (("q1", "no label"),)
    assert examples["LaMP-2M seed 5", "mta"] == ()
    # mta and rag answer alike with seed 3 only.
    assert data.identical == {"mean": [], "LaMP-2M": []}


def test_the_curve_has_what_all_seeds_have_and_the_run_itself(data: ReportData) -> None:
    points = {one.items: one.point for one in data.curve["LaMP-2M"]["mta"]}
    assert points == {2: 0.375, 6: 0.6875}


def test_costs_are_means_of_who_has_any(data: ReportData) -> None:
    expected = {"mta": dict.fromkeys(COSTS, 1.5)}
    assert data.costs == {"mean": expected, "LaMP-2M": expected}


def test_the_page_names_nobody(data: ReportData) -> None:
    """Counts of users and authors stand there, no names."""
    text = report_html(data)
    assert AUTHOR not in text
    assert text.count("<td>17</td>") == 2
    assert data.notes == ["few"]
    assert data.config.all_seeds == [3, 5]

"""What the report says, gathered from results in a store: two seeds, two methods, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tasks.compare import DRAWS_FILE, overall
from tasks.config.run import resolve
from tasks.report.page import NoLabel, ReportData, primary, report_data, report_html
from tasks.report.table import COSTS, Row
from tasks.results.models import Compared
from tasks.results.run import Cell
from tasks.results.store import Store, store
from tests.unit.report.cells import answered, cell, compared, estimate, run, users

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
    values = {"mta": mta, "base": base, "rag": (base + mta) / 2}
    intervals = {m: {n: estimate(one) for n in ("accuracy", "score")} for m, one in values.items()}
    found = {method: answered(said) for method, said in answers.items()}
    shares = {name: sum("no" in one for one in said) / 2 for name, said in answers.items()}
    one = compared("LaMP-2M", no_label=shares, **found)
    return one.model_copy(update=about | {"intervals": intervals})


def scored(seed: int, base: float, mta: float, curve: dict[int, Compared]) -> Cell:
    said = {
        "mta": ["comedy", "action"],
        "base": ["comedy", "no label"] if seed == 3 else ["no", "none"],
        "rag": ["comedy", "action" if seed == 3 else "comedy"],
    }
    return cell(
        drawn(base, mta, **said),
        seed,
        CONFIG,
        curve=curve,
        users=users(counts=COUNTS, audit=AUDIT, few_shot_ids=(AUTHOR,)),
    )


@pytest.fixture
def data(where: Store) -> ReportData:
    fewer = drawn(0.125, 0.375)
    # Seed 5 has nothing at 4 items.
    cells = [
        scored(3, 0.5, 0.625, {2: fewer, 4: fewer}),
        scored(5, 0.25, 0.75, {2: fewer}),
    ]
    mean = overall(tuple(cell.compared for cell in cells))
    table: list[Row] = [
        {"lamp_task": "LaMP-2M", "seed": seed, "method": "mta", **dict.fromkeys(COSTS, cost)}
        for seed, cost in ((3, 1.0), (5, 2.0))
    ]
    table.append({"lamp_task": "LaMP-2M", "seed": 3, "method": "bayes"})
    config = resolve(CONFIG).model_dump(mode="json")
    return report_data(run(*cells, overall=mean, config=config), table, ["few"], None)


def test_seeds_are_averaged_and_stand_alone(data: ReportData) -> None:
    assert data.methods == ["base", "rag", "mta"]
    assert data.references == []
    mean = data.means["LaMP-2M"]
    scores = {
        seed: {method: own["accuracy"].point for method, own in one["LaMP-2M"].intervals.items()}
        for seed, one in {None: data.means, **data.by_seed}.items()
    }
    assert scores == {
        None: {"mta": 0.6875, "base": 0.375, "rag": 0.53125},
        3: {"mta": 0.625, "base": 0.5, "rag": 0.5625},
        5: {"mta": 0.75, "base": 0.25, "rag": 0.5},
    }
    assert (primary(mean), mean.groups, mean.queries) == ("accuracy", 8, 16)
    # The 2.5th percentile of 101 even draws is 2.5 steps of .001 from the lowest.
    own = mean.intervals["mta"]["accuracy"]
    assert (own.lo, own.hi) == (pytest.approx(0.64), pytest.approx(0.735))


def test_differences_are_of_all_pairs(data: ReportData) -> None:
    """All draws move alike, so a difference is the same in each: it holds."""
    for mean in (data.overall, data.means["LaMP-2M"]):
        found = {
            (method, opponent): (one.point, one.lo, one.hi, one.holds)
            for method, own in mean.differences.items()
            for opponent, metrics in own.items()
            for one in [metrics["score"]]
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
    assert data.no_label == [
        NoLabel("LaMP-2M seed 3", "base", 0.5, [("q1", "no label")]),
        NoLabel("LaMP-2M seed 5", "base", 1.0, [("q0", "no"), ("q1", "none")]),
    ]
    # mta and rag answer alike with seed 3 only.
    assert data.identical == {"mean": [], "LaMP-2M": []}


def test_the_curve_has_what_all_seeds_have_and_the_run_itself(data: ReportData) -> None:
    curve = data.curve["LaMP-2M"].items()
    points = {items: one.intervals["mta"]["score"].point for items, one in curve}
    assert points == {2: 0.375, 6: 0.6875}


def test_costs_are_means_of_who_has_any(data: ReportData) -> None:
    for task in ("mean", "LaMP-2M"):
        found = {cost: data.row_mean(cost, "mta", task) for cost in COSTS}
        assert found == dict.fromkeys(COSTS, 1.5)
    assert data.row_mean(COSTS[0], "mta", "LaMP-2M", 5) == 2.0
    assert data.row_mean(COSTS[0], "bayes") is data.row_mean(COSTS[0], "mta", "LaMP-3") is None


def test_the_page_names_nobody(data: ReportData) -> None:
    """Counts of users and authors stand there, no names."""
    text = report_html(data)
    assert AUTHOR not in text
    assert text.count("<td>17</td>") == 2
    assert data.notes == ["few"]
    assert data.config.all_seeds == [3, 5]

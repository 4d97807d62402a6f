"""A small page as `report_data` gives it, with numbers chosen by hand."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from tasks.config.run import resolve
from tasks.report.chosen import Chosen, Weights
from tasks.report.page import NoLabel, ReportData
from tasks.report.table import COSTS
from tasks.results.models import Difference, Estimate
from tests.unit.report.cells import NOWHERE, cell, compared, estimate, run, users

HOSTILE = '<script>alert("x")</script>&'
AUDIT = {
    "labels": {"golds": None},
    "queries": {"few_shot": {"asked": 15, "text": {"any": 2}, "text_and_answer": {"any": 1}}},
    "profile_lengths": {"few_shot": {"min": 2, "median": 3, "max": 4}},
}
COUNTS = {
    "base_users": 1, "anchor_candidates": 2, "few_shot_users": 5, "few_shot_groups": 5,
    "queries": 15,
}  # fmt: skip


def difference(point: float, lo: float | None, hi: float | None, holds: bool | None) -> Difference:
    return Difference(point=point, lo=lo, hi=hi, holds=holds)


def report_case(
    lamp_tasks: Sequence[str] = ("LaMP-2M",),
    seeds: Sequence[int] = (0,),
    missing: Sequence[str] = (),
    **changes: Any,
) -> ReportData:
    """Two methods and bayes on one LaMP task and seed; `changes` replace fields.

    lamp_tasks, seeds: of the run; the scores of each LaMP task are the same.
    """
    scores: dict[str, dict[str, Estimate]] = {
        "base": {"accuracy": estimate(0.5, 0.4, 0.625), "macro_f1": estimate(None)},
        "mta": {"accuracy": estimate(0.61234, 0.5, 0.7), "macro_f1": estimate(0.25)},
        "bayes": {"accuracy": estimate(0.9, 0.8, 1.0), "macro_f1": estimate(0.75, 0.5, 1.0)},
    }
    for own in scores.values():
        own["score"] = own["accuracy"]
    scores["mta"]["share_of_attainable"] = estimate(0.25, -0.125, 0.5)
    intervals = {
        name: {"score": own["accuracy"], "share_of_attainable": estimate(0.125)}
        for name, own in scores.items()
    }
    better = {
        "mta": {"base": {"score": difference(0.11234, 0.01, 0.2, True)}},
        "base": {"mta": {"score": difference(-0.11234, -0.2, -0.01, True)}},
    }
    about = {"groups": 5, "queries": 15, "differences": better}
    mean = compared().model_copy(update=about | {"intervals": scores})
    cells = {"intervals": intervals, "cells": len(lamp_tasks) * len(seeds)}
    rows: list[dict[str, Any]] = [
        {"lamp_task": task, "method": method, "no_label": share}
        for task in lamp_tasks
        for method, share in (("base", 0.8125), ("mta", 0.0))
    ]
    for row in rows[1::2]:
        row.update(dict.fromkeys(COSTS, 1234.5))
    examples = [(HOSTILE, HOSTILE), ("q2", " \n"), ("q3", "word " * 40)]
    one = cell(compared(), seed=0, users=users(counts=COUNTS, dropped={HOSTILE: 3}, audit=AUDIT))
    points = {
        items: compared(mta=NOWHERE, bayes=NOWHERE).model_copy(
            update={"intervals": {"mta": {"score": mta}, "bayes": {"score": bayes}}}
        )
        for items, mta, bayes in (
            (2, estimate(0.5), estimate(None)),
            (4, estimate(0.6, 0.5, 0.7), estimate(0.9)),
        )
    }
    weights = Weights(
        rows=["0", "1"], columns=["0"], users=[2, 3], anchors=[4.0], weights=[[1.0], [1.0]],
        same_sort=0.4, equal_chosen=0.3, equal_all=0.2,
    )  # fmt: skip
    data = ReportData(
        run=run(one, name=HOSTILE, date="2020-01-02 03:04", missing=tuple(missing)),
        config=resolve({"data": HOSTILE, "seeds": list(seeds)}),
        overall=deepcopy(compared().model_copy(update=about | cells)),
        methods=["base", "mta"],
        references=["bayes"],
        means={task: deepcopy(mean) for task in lamp_tasks},
        by_seed={},
        identical={"mean": [], **{task: [] for task in lamp_tasks}},
        no_label=[NoLabel("LaMP-2M", "base", 0.8125, examples)],
        curve={"LaMP-2M": points},
        chosen=[Chosen("LaMP-2M", 0, ("mta",), "archetype", weights)],
        table=rows,
        notes=[HOSTILE],
        since=None,
    )
    return replace(data, **changes)

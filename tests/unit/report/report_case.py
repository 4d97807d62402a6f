"""A small page as `report_data` gives it, with numbers chosen by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tasks.config.run import resolve
from tasks.report.answers import NoLabel
from tasks.report.chosen import Chosen
from tasks.report.page_data import CurvePoint, ReportData, Table, TaskScores
from tasks.results.models import Difference, Estimate
from tests.unit.report.cells import cell, compared, estimate, run, users

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
    about = {"groups": 5, "queries": 15, "cells": len(lamp_tasks) * len(seeds)}
    overall = compared().model_copy(update=about | {"intervals": intervals})
    task = TaskScores(
        primary="accuracy", groups=5, queries=15, scores=scores,
        no_label={"base": 0.8125, "mta": 0.0},
    )  # fmt: skip
    costs = dict.fromkeys(
        ("bytes_per_user", "steps_per_user", "tokens_per_user", "seconds_per_user"), 1234.5
    )
    better = {
        "mta": {"base": difference(0.11234, 0.01, 0.2, True)},
        "base": {"mta": difference(-0.11234, -0.2, -0.01, True)},
    }
    examples = ((HOSTILE, HOSTILE), ("q2", " \n"), ("q3", "word " * 40))
    one = cell(compared(), seed=0, users=users(counts=COUNTS, dropped={HOSTILE: 3}, audit=AUDIT))
    fields = {
        "run": run(one, name=HOSTILE, date="2020-01-02 03:04", missing=tuple(missing)),
        "config": resolve({"data": HOSTILE, "seeds": list(seeds)}),
        "overall": overall,
        "methods": ["base", "mta"],
        "references": ["bayes"],
        "tables": [Table(seed=None, cells=dict.fromkeys(lamp_tasks, task))],
        "costs": {"mean": {"mta": costs}, "LaMP-2M": {"mta": costs}},
        "differences": {"mean": better, "LaMP-2M": better},
        "identical": {"mean": [], "LaMP-2M": []},
        "no_label": [
            NoLabel(cell="LaMP-2M", method="base", share=0.8125, examples=examples),
            NoLabel(cell="LaMP-2M", method="mta", share=0.0, examples=()),
        ],
        "curve": {
            "LaMP-2M": {
                "mta": [_point(2, estimate(0.5)), _point(4, estimate(0.6, 0.5, 0.7))],
                "bayes": [_point(2, estimate(None)), _point(4, estimate(0.9))],
            }
        },
        "maps": [],
        "chosen": [
            Chosen(
                lamp_task="LaMP-2M", seed=0, methods=("mta",), by="archetype", rows=["0", "1"],
                columns=["0"], users=[2, 3], anchors=[4.0], weights=[[1.0], [1.0]], own=0.4,
                equal_chosen=0.3, equal_all=0.2,
            )
        ],
        "notes": [HOSTILE],
        "since": None,
    }  # fmt: skip
    # Built of copies: a test may change its own.
    return ReportData.model_validate_json(
        ReportData.model_validate(fields | changes).model_dump_json()
    )


def _point(items: int, score: Estimate) -> CurvePoint:
    return CurvePoint(items=items, **dict(score))

"""A small dict as `report_data` gives it, with numbers chosen by hand."""

from __future__ import annotations

from typing import Any

HOSTILE = '<script>alert("x")</script>&'


def estimate(point: float | None, lo: float | None = None, hi: float | None = None) -> Any:
    return {"point": point, "lo": lo, "hi": hi}


def difference(point: float, lo: float | None, hi: float | None, holds: bool | None) -> Any:
    return {"point": point, "lo": lo, "hi": hi, "holds": holds}


def report_case(**changes: Any) -> dict[str, Any]:
    """Two methods and bayes on one LaMP task and seed; `changes` replace top-level keys."""
    scores = {
        "base": {"accuracy": estimate(0.5, 0.4, 0.625), "macro_f1": estimate(None)},
        "mta": {"accuracy": estimate(0.61234, 0.5, 0.7), "macro_f1": estimate(0.25)},
        "bayes": {"accuracy": estimate(0.9, 0.8, 1.0), "macro_f1": estimate(0.75, 0.5, 1.0)},
    }
    for own in scores.values():
        own["score"] = own["accuracy"]
    scores["mta"]["share_of_attainable"] = estimate(0.25, -0.125, 0.5)
    overall = {
        name: {"score": own["accuracy"], "share_of_attainable": estimate(0.125)}
        for name, own in scores.items()
    }
    cells = {
        "LaMP-2M": {
            "primary": "accuracy", "groups": 5, "queries": 15, "scores": scores,
            "no_label": {"base": 0.8125, "mta": 0.0},
        }
    }  # fmt: skip
    costs = dict.fromkeys(
        ("bytes_per_user", "steps_per_user", "tokens_per_user", "seconds_per_user"), 1234.5
    )
    better = {
        "mta": {"base": difference(0.11234, 0.01, 0.2, True)},
        "base": {"mta": difference(-0.11234, -0.2, -0.01, True)},
    }
    no_label = {"lamp_task": "LaMP-2M", "seed": 0, "method": "base", "share": 0.8125}
    no_label |= {"examples": [[HOSTILE, HOSTILE], ["q2", " \n"], ["q3", "word " * 40]]}
    data = {
        "about": {
            "name": HOSTILE, "date": "2020-01-02 03:04", "data": HOSTILE, "preset": "embedded",
            "base": "tiny", "seeds": [0], "lamp_tasks": ["LaMP-2M"], "items": None,
        },
        "methods": ["base", "mta"],
        "references": ["bayes"],
        "tables": [{"seed": None, "cells": cells}],
        "overall": {"cells": 1, "groups": 5, "queries": 15, "intervals": overall},
        "costs": {"mean": {"mta": costs}, "LaMP-2M": {"mta": costs}},
        "differences": {"mean": better, "LaMP-2M": better},
        "identical": {"mean": [], "LaMP-2M": []},
        "no_label": [no_label, no_label | {"method": "mta", "share": 0.0, "examples": []}],
        "curve": {
            "LaMP-2M": {
                "mta": [{"items": 2, **estimate(0.5)}, {"items": 4, **estimate(0.6, 0.5, 0.7)}],
                "bayes": [{"items": 2, **estimate(None)}, {"items": 4, **estimate(0.9)}],
            }
        },
        "maps": [],
        "chosen": [
            {
                "lamp_task": "LaMP-2M", "seed": 0, "methods": ["mta"], "by": "archetype",
                "rows": ["0", "1"], "columns": ["0"], "users": [2, 3], "anchors": [4.0],
                "weights": [[1.0], [1.0]], "own": 0.4, "equal_chosen": 0.3, "equal_all": 0.2,
            }
        ],
        "audit": [
            {
                "lamp_task": "LaMP-2M",
                "seed": 0,
                "counts": {
                    "base_users": 1, "anchor_candidates": 2, "few_shot_users": 5,
                    "few_shot_groups": 5, "queries": 15,
                },
                "dropped": {HOSTILE: 3},
                "groups": {"1": 5},
                "queries": {"asked": 15, "text": {"any": 2}, "text_and_answer": {"any": 1}},
                "duplicates": {},
                "majority_share": None,
                "profile_lengths": {"few_shot": {"min": 2, "median": 3, "max": 4}},
            }
        ],
        "notes": [HOSTILE],
        "missing": [],
        "since": None,
        "config": {"data": HOSTILE},
    }  # fmt: skip
    return data | changes

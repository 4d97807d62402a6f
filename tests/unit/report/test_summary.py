"""A run in a few lines of plain text."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.config.run import resolve
from tasks.report.notes import data_lines, distrust, seed_lines
from tasks.report.page import run_summary
from tasks.results.run import Cell
from tests.unit.report.cells import cell, compared, estimate, run
from tests.unit.report.report_case import HOSTILE, report_case


def test_what_ran_and_what_came_out_have_no_marks_of_a_page() -> None:
    ran, came_out = run_summary(report_case())
    assert "2 methods on LaMP-2M, seed 0, answered 15 queries of 5 groups of users: " in ran
    assert f"data {HOSTILE}, preset embedded, base model tiny." in ran
    assert came_out.startswith("On LaMP-2M the best method is mta with a score of ")
    assert not {"<", ">", "&amp;"} & set(came_out.split())
    assert "<" not in came_out


@pytest.mark.parametrize(
    ("given", "missing", "said"),
    [
        (
            {},
            (),
            "(one seed was run); the users are generated and the base model is tiny.",
        ),
        ({"model": "org/llama"}, (), "(one seed was run); the users are generated."),
        ({"data": "x.json", "seeds": [1, 2]}, (), "(the notes compare the seeds)."),
        ({"data": "x.json"}, ("a", "b"), "(one seed was run); 2 pieces are missing."),
    ],
)
def test_what_to_distrust(given: dict[str, Any], missing: tuple[str, ...], said: str) -> None:
    table: list[Any] = [{"no_label": 0.2}, {"no_label": None}]
    line = distrust(run(missing=missing), resolve(given), table, 20)
    assert line == f"What to distrust: the intervals cover sampling of users, not retraining {said}"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, False),
        ({"model": "org/llama"}, True),
        ({"model": "org/llama", "data": "my-users.json"}, False),
        ({"data": "my-users.json"}, False),
    ],
)
def test_a_real_model_on_generated_users_is_said(given: dict[str, Any], said: bool) -> None:
    lines = data_lines(resolve(given))
    assert bool(lines) == said
    assert all("mean nothing to the model org/llama; give data=FOLDER" in one for one in lines)


def test_seeds_by_hand() -> None:
    """Two LaMP tasks, two seeds: .5 and .7 for mta, .4 and .4 for base; a seed that lacks one."""

    def one(seed: int, task: str, mta: float, base: float) -> Cell:
        intervals = {
            "mta": {"score": estimate(mta), "share_of_attainable": estimate(mta / 2)},
            "base": {"score": estimate(base)},
        }
        return cell(compared(task).model_copy(update={"intervals": intervals}), seed)

    found = [
        one(0, "LaMP-1", 0.4, 0.3),
        one(0, "LaMP-3", 0.6, 0.5),
        one(1, "LaMP-1", 0.8, 0.4),
        one(1, "LaMP-3", 0.6, 0.4),
        one(2, "LaMP-3", 0.9, 0.9),
    ]
    said = "by seed (0, 1), which no interval contains: "
    assert seed_lines(found) == [
        f"{said}mean score, mta - base: +0.1000, +0.3000",
        f"{said}share of the attainable, mta: 0.250, 0.350",
    ]
    assert seed_lines(found[:2]) == []

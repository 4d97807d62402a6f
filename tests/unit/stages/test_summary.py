"""A run in a few lines of plain text."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.config import resolve
from tasks.report.summary import data_lines, run_summary
from tests.unit.stages.report_case import report_case


def test_what_ran_and_what_came_out_have_no_marks_of_a_page() -> None:
    ran, came_out = run_summary(report_case())
    about = report_case()["about"]
    assert f"on {', '.join(about['lamp_tasks'])}, seed " in ran
    assert f"data {about['data']}, preset {about['preset']}, base model {about['base']}." in ran
    assert "queries of" in came_out
    assert not {"<", ">", "&amp;"} & set(came_out.split())
    assert "<" not in came_out


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

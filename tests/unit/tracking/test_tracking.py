"""What MLflow is given of a training's losses, and where it shows the methods."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.tracking.entries import thinned
from tasks.tracking.server import methods_page


def test_few_losses_stay_as_they_are() -> None:
    assert thinned([]) == []
    assert thinned([0.5, 0.25], most=2) == [(1, 0.5), (2, 0.25)]


def test_many_losses_by_hand() -> None:
    """Seven in at most three points: three steps each, the last stands for one."""
    assert thinned([1, 2, 3, 4, 5, 6, 7], most=3) == [(3, 2.0), (6, 5.0), (7, 7.0)]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=300), st.integers(1, 50))
def test_points_stand_for_all_steps(losses: list[float], most: int) -> None:
    points = thinned(losses, most)
    assert len(points) <= most
    ends = [0, *(step for step, _ in points)]
    assert ends == sorted(set(ends))
    assert ends[-1] == len(losses)
    whole = sum(loss * (end - start) for start, (end, loss) in zip(ends, points, strict=False))
    assert whole == pytest.approx(sum(losses), abs=1e-9)


def test_the_docs_link_the_page_of_all_methods() -> None:
    """tests/flows/test_report_page.py opens such a page; the docs have this one."""
    page = Path(__file__).parents[3] / "docs" / "compare-runs.md"
    assert f"(http://127.0.0.1:5000/{methods_page('1')})" in page.read_text(encoding="utf-8")


def test_the_page_of_a_runs_methods() -> None:
    place = urlsplit(urlsplit(methods_page("3", "0a1b")).fragment)
    assert place.path == "/experiments/3/runs"
    wanted = "tags.kind = 'method' and tags.mlflow.parentRunId = '0a1b'"
    assert parse_qs(place.query)["searchFilter"] == [wanted]

"""Means over cells: by hand, in closed form, and of samples that have users in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tasks.errors import InputError
from tasks.lamp.statistics import Resampled, bootstrap, difference, intervals, mean_over
from tests.unit.lamp.statistics_case import CEILING, FLOOR, MODEL, MOVIES, cell, hits, world


def test_mean_over_cells() -> None:
    """Cells are independent: the mean's variance is the sum of theirs, divided by 4.

    2,000 draws know a variance to 3 %, and the correlation of two cells to .022.
    """
    first = world({"a": FLOOR, "b": MODEL, "only here": MODEL}, "world 0")
    second = world({"b": CEILING, "a": MODEL}, "world 1")
    mean = mean_over([first, second])
    assert mean.methods == ("a", "b")
    assert (mean.groups, mean.queries) == (20, 200)
    assert mean.points["score"].tolist() == pytest.approx([(0.3 + 0.6) / 2, (0.6 + 0.9) / 2])
    assert set(mean.points) == {"score"}
    alone = [first.draws["score"][:, 0], second.draws["score"][:, 1]]
    assert abs(np.corrcoef(alone)[0, 1]) < 0.09
    assert mean.draws["score"][:, 0].var() == pytest.approx(
        sum(d.var() for d in alone) / 4, rel=0.1
    )
    assert difference(mean, "b", "a")["score"]["point"] == pytest.approx(0.3)
    assert difference(mean, "b", "a")["score"]["holds"] is True


def test_mean_over_cells_of_one_task_has_all_metrics() -> None:
    """A mean of one cell is the cell, to the last bit; macro F1 has no mean over tasks."""
    first = world({"a": FLOOR, "b": MODEL}, "world 0")
    second = world({"a": MODEL, "b": CEILING}, "world 1")
    alone = mean_over([first], metrics=None)
    assert intervals(alone) == intervals(first)
    both = mean_over([first, second], metrics=None)
    assert list(both.points) == ["accuracy", "macro_f1", "score"]
    for name in both.points:
        expected = (first.points[name] + second.points[name]) / 2
        assert both.points[name].tolist() == pytest.approx(expected.tolist())


def test_the_same_users_under_another_seed_are_no_new_users() -> None:
    """Two training seeds with the same answers on one sample: the mean's interval is the one's."""
    one = world({"m": MODEL}, "published users")
    assert (
        intervals(mean_over([one, world({"m": MODEL}, "published users")]))["m"]["score"]
        == (intervals(one)["m"]["score"])
    )
    other = intervals(mean_over([one, world({"m": MODEL}, "other users")]))["m"]["score"]
    assert other != intervals(one)["m"]["score"]


def test_mean_of_shares() -> None:
    cells = [
        world({"nonpersonal": FLOOR, "bayes": CEILING, "m": given}, f"world {n}")
        for n, given in enumerate((MODEL, CEILING))
    ]
    found = intervals(mean_over(cells))
    assert found["m"]["share_of_attainable"]["point"] == pytest.approx((0.5 + 1) / 2)
    assert set(intervals(mean_over([*cells, world({"m": MODEL})]))["m"]) == {"score"}


def dealt(numbers: Sequence[int], sample: str = "a file") -> Resampled:
    """One query each of the groups of these numbers; three of ten are answered rightly."""
    right = hits({f"g{n:03d}": [n % 10 < 3] for n in numbers})
    return bootstrap(cell(MOVIES, right, sample=sample), 0)


def test_users_that_two_cells_share_are_drawn_once() -> None:
    """80 of 120 groups in each of two cells, 40 in both.

    To first order a draw moves the mean by the sum over groups of (times drawn - 1) times the
    group's part in it, (x - mean) / 80 / 2 in each cell that holds it; so its variance is the sum
    of the squares, .3 * .7 * (80 / 160**2 + 40 * 4 / 160**2). Were the cells independent, it would
    be a third less. 2,000 draws know a variance to 3 %.
    """
    cells = [dealt(range(80)), dealt(range(40, 120))]
    mean = mean_over(cells)
    assert (mean.groups, mean.queries) == (120, 160)
    assert mean.points["score"] == pytest.approx([0.3])
    expected = 0.3 * 0.7 * (80 + 40 * 4) / 160**2
    assert mean.draws["score"].var() == pytest.approx(expected, rel=0.12)
    apart = mean_over([cells[0], dealt(range(40, 120), "another file")])
    assert apart.groups == 160
    assert apart.draws["score"].var() == pytest.approx(0.3 * 0.7 * 160 / 160**2, rel=0.12)


def test_no_draw_leaves_a_cell_empty() -> None:
    """Of 12 groups, 2 in each cell: one draw in ten ((10 / 12)**12 = .112) has none of a cell's."""
    cells = [dealt(range(first, first + 2)) for first in range(11)]
    mean = mean_over(cells)
    assert mean.draws["score"].shape == (2000, 1)
    assert np.isfinite(mean.draws["score"]).all()


def test_a_cell_of_one_group_has_no_interval_and_neither_has_the_mean() -> None:
    mean = mean_over([dealt([0]), dealt([0, 1, 5])])
    assert intervals(mean)["m"]["score"] == {
        "point": pytest.approx((1 + 2 / 3) / 2),
        "lo": None,
        "hi": None,
    }


def test_no_method_in_common() -> None:
    with pytest.raises(InputError, match="no method was scored in all"):
        mean_over([world({"m": MODEL}), world({"n": MODEL})])

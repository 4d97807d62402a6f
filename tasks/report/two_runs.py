"""Two runs against each other: each method's score in both, and the paired difference.

Both must have asked the same queries. Then the bootstrap drew the same groups of users in both
(tasks/lamp/statistics.py). So a method's difference between two runs has an interval, as the
difference of two methods in one run has.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tasks.compare import read_draws
from tasks.errors import InputError
from tasks.lamp.statistics import (
    COMMON_METRICS,
    Resampled,
    difference,
    intervals,
    mean_over,
    same_width,
)
from tasks.methods import METHODS
from tasks.report.files import REPORTS_FOLDER, report_name, write_state
from tasks.report.page import templates
from tasks.report.table import Row, table_text
from tasks.results.models import Difference, Estimate
from tasks.results.run import Cell, Run
from tasks.results.store import store

FIRST, SECOND = "first", "second"


@dataclass(frozen=True)
class Change:
    """A method's metric in the first run and in the second; by: the second minus the first.

    lamp_task: the name, or `mean` for the mean over LaMP tasks and seeds.
    """

    lamp_task: str
    method: str
    metric: str
    first: Estimate
    second: Estimate
    by: Difference

    @property
    def shown(self) -> str:
        """Whether the interval shows a difference."""
        return {True: "holds", False: "not shown", None: "no interval"}[self.by.holds]


@dataclass(frozen=True)
class TwoRuns:
    """settings: lines on what differs in the configuration. left_out: on what one run alone has."""

    first: Run
    second: Run
    changes: list[Change]
    settings: list[str]
    left_out: list[str]

    def text(self) -> str:
        """The comparison for a terminal."""
        rows: list[Row] = []
        for one in self.changes:
            row = {"lamp_task": one.lamp_task, "method": one.method, "metric": one.metric}
            numbers: dict[str, float | None] = {}
            for name, value in ((FIRST, one.first), (SECOND, one.second), ("difference", one.by)):
                numbers |= {name: value.point, f"{name}_lo": value.lo, f"{name}_hi": value.hi}
            rows.append({**row, **numbers, "verdict": one.shown})
        return table_text(rows, [*self.settings, *self.left_out], ())

    @property
    def main(self) -> list[Change]:
        """The changes of the mean, which comes last, or of the only LaMP task."""
        return [one for one in self.changes if one.lamp_task == self.changes[-1].lamp_task]

    def page(self) -> Path:
        """Write the page beside the runs' reports; returns its file."""
        name = report_name(f"{self.first.name}-{self.second.name}", self.second.id)
        html = templates().get_template("two_runs.html.jinja").render(vars(self), main=self.main)
        return write_state(f"{REPORTS_FOLDER}/{name}.html", html)


def two_runs(first: Run, second: Run) -> TwoRuns:
    """Compare what both runs have: LaMP tasks, seeds and methods.

    Raises InputError if they have nothing in common, or did not ask the same queries.
    """
    firsts, seconds = first.by_place, second.by_place
    both = [place for place in firsts if place in seconds]
    if not both:
        raise InputError(
            f"{first.name} and {second.name} have no LaMP task and seed in common; run one of them "
            "with the other's lamp_tasks and seed"
        )
    by_task: dict[str, list[Resampled]] = {}
    for task, seed in both:
        by_task.setdefault(task, []).append(paired(firsts[task, seed], seconds[task, seed]))
    changes = [one for task, cells in by_task.items() for one in _changes(task, cells)]
    if len(by_task) > 1:
        changes += _changes("mean", [one for cells in by_task.values() for one in cells])
    left_out = [
        f"{task}, seed {seed}: in one of the runs alone"
        for task, seed in sorted(firsts.keys() ^ seconds.keys())
    ]
    methods = [{name for cell in run.cells for name in cell.answers} for run in (first, second)]
    left_out += [
        f"{name}: in one of the runs alone" for name in METHODS if name in methods[0] ^ methods[1]
    ]
    return TwoRuns(first, second, changes, differing(first.config, second.config), left_out)


def paired(first: Cell, second: Cell) -> Resampled:
    """Two cells as one, with the methods of both, called `first NAME` and `second NAME`.

    Raises InputError if their queries, scoring or bootstrap draws are not the same.
    """
    asked = [_queries(cell) for cell in (first, second)]
    if alone := asked[0] ^ asked[1]:
        raise InputError(
            f"{first.name}: {len(alone)} of {len(asked[0] | asked[1])} queries were asked in one "
            "of the runs alone, so scores are no pairs; compare runs of the same data and seed"
        )
    a, b = (read_draws(cell.compared) for cell in (first, second))
    methods = (*(f"{FIRST} {m}" for m in a.methods), *(f"{SECOND} {m}" for m in b.methods))
    metrics = [name for name in COMMON_METRICS if name in a.points and name in b.points]
    points = {name: np.concatenate([a.points[name], b.points[name]]) for name in metrics}
    draws = {name: np.concatenate([a.draws[name], b.draws[name]], axis=1) for name in metrics}
    assert a.scored is not None
    assert b.scored is not None
    if (a.scored.groups, a.scored.rules) != (b.scored.groups, b.scored.rules):
        raise InputError(
            f"{first.name}: the runs were not scored alike (users are in other groups, or "
            "scoring.metrics and scoring.tokens differ)"
        )
    if a.scored.sample != b.scored.sample:
        raise InputError(
            f"{first.name}: one run generated its users (data=synthetic), the other read them from "
            "a file, so their draws are no pairs; run both on the same data"
        )
    sums = np.concatenate(same_width([a.scored.sums, b.scored.sums]), axis=1)
    totals = np.concatenate(same_width([a.scored.totals, b.scored.totals]), axis=0)
    scored = replace(a.scored, methods=methods, sums=sums, totals=totals)
    return Resampled(methods, a.groups, a.queries, points, draws, scored)


def differing(first: Mapping[str, Any], second: Mapping[str, Any], above: str = "") -> list[str]:
    """A line for each setting that differs: its name, and its value in both runs."""
    lines = []
    for name in dict.fromkeys((*first, *second)):
        then, now = first.get(name), second.get(name)
        if isinstance(then, dict) and isinstance(now, dict):
            lines += differing(then, now, f"{above}{name}.")
        elif then != now:
            lines.append(f"{above}{name}: {then} -> {now}")
    return lines


def _changes(task: str, cells: list[Resampled]) -> Iterator[Change]:
    mean = mean_over(cells)
    known = intervals(mean)
    for method in METHODS:
        names = f"{FIRST} {method}", f"{SECOND} {method}"
        if all(name in mean.methods for name in names):
            by = difference(mean, names[1], names[0])
            for metric, one in by.items():
                then, now = (Estimate.model_validate(known[name][metric]) for name in names)
                yield Change(task, method, metric, then, now, Difference.model_validate(one))


def _queries(cell: Cell) -> set[tuple[str, ...]]:
    """(user_id, query_id, gold) of all that a cell was scored on."""
    table = pl.read_parquet(store().path(cell.compared.scored[0].predictions))
    return set(table.select("user_id", "query_id", "gold").iter_rows())

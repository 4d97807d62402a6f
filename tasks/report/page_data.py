"""What the templates of report.html get: `ReportData`.

data.py gathers it from a run's results, html.py renders it. A score is a mean over the run's seeds
where no seed is named.
"""

from __future__ import annotations

from tasks.config.run import RunConfig
from tasks.record import Record
from tasks.report.answers import NoLabel
from tasks.report.chosen import Chosen
from tasks.report.since import Since
from tasks.results.models import Compared, Difference, Estimate
from tasks.results.run import Merging, Run

# method -> metric -> estimate; the main metric comes first.
Scores = dict[str, dict[str, Estimate]]


class TaskScores(Record):
    """One LaMP task. primary: its main metric. no_label: method -> share (0..1) of its answers."""

    primary: str
    groups: int
    queries: int
    no_label: dict[str, float]
    scores: Scores


class Table(Record):
    """The scores of one seed (None: means over all seeds) by LaMP task."""

    seed: int | None
    cells: dict[str, TaskScores]


class CurvePoint(Estimate):
    """The score with at most `items` items per few-shot user."""

    items: int


class UsersMap(Record):
    """The picture of a bank's users, as a data URI."""

    lamp_task: str
    seed: int
    merging: Merging
    picture: str


class ReportData(Record):
    """The whole page. A scope is a LaMP task, or "mean" over them.

    overall: the mean over LaMP tasks and seeds. references: answers of no model, where the optimum
    is known. tables: the mean over seeds, then each of several seeds. costs: scope -> method ->
    cost. differences: scope -> method -> opponent. identical: scope -> groups of methods that
    answered alike. curve: LaMP task -> method.
    """

    run: Run
    config: RunConfig
    overall: Compared
    methods: list[str]
    references: list[str]
    tables: list[Table]
    costs: dict[str, dict[str, dict[str, float]]]
    differences: dict[str, dict[str, dict[str, Difference]]]
    identical: dict[str, list[list[str]]]
    no_label: list[NoLabel]
    curve: dict[str, dict[str, list[CurvePoint]]]
    maps: list[UsersMap]
    chosen: list[Chosen]
    notes: list[str]
    since: Since | None

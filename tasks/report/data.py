"""What report.html says (page_data.py), gathered from the results of a run.

Numbers of one LaMP task are means over the run's seeds; with several seeds each stands alone, too.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tasks.compare import read_draws
from tasks.config.run import RunConfig
from tasks.methods import METHODS
from tasks.report.answers import NoLabel, identical, no_labels
from tasks.report.chosen import chosen_by_merging
from tasks.report.page_data import CurvePoint, ReportData, Table, UsersMap
from tasks.report.since import Since
from tasks.results.models import Compared, Difference
from tasks.results.run import Cell, Run
from tasks.results.store import store

if TYPE_CHECKING:
    from tasks.lamp.statistics import Resampled

# Answers of no model, in worlds whose optimum is known, from the least to the most knowing.
REFERENCES = ("nonpersonal", "bayes", "oracle")
# A cell's main metric is the first of these that it has.
PRIMARY = ("accuracy", "mae", "rougeL")
COSTS = ("bytes_per_user", "steps_per_user", "tokens_per_user", "seconds_per_user")


def report_data(
    run: Run, table: list[dict[str, Any]], notes: list[str], changed: Since | None
) -> ReportData:
    """Everything the report shows; of texts, only answers of methods: nothing that a user wrote.

    table: `table.rows` of all cells (their costs are taken). Raises InputError when a result is
    gone from the store.
    """
    assert run.overall is not None
    config = RunConfig.model_validate(run.config)
    by_task: dict[str, list[Cell]] = {}
    for cell in run.cells:
        by_task.setdefault(cell.config.lamp_task, []).append(cell)
    means = {task: _mean([cell.compared for cell in own]) for task, own in by_task.items()}
    overall = _mean([cell.compared for cell in run.cells], metrics=("score",))
    unlabelled = {cell.name: no_labels(cell) for cell in run.cells}
    tables = [_table(None, by_task, means, unlabelled)]
    for seed in config.all_seeds if len(config.all_seeds) > 1 else []:
        if own := {task: [one] for task in by_task if (one := run.cell(task, seed))}:
            alone = {task: _mean([cell.compared]) for task, (cell,) in own.items()}
            tables.append(_table(seed, own, alone, unlabelled))
    scored = {name for mean in means.values() for name in mean.methods}
    return ReportData(
        run=run,
        config=config,
        overall=run.overall,
        # As they are listed everywhere else, whatever order they were asked in.
        methods=[name for name in METHODS if name in scored],
        references=[name for name in REFERENCES if name in scored],
        tables=tables,
        costs=_costs(table),
        differences={
            scope: _differences(mean) for scope, mean in {"mean": overall, **means}.items()
        },
        identical={scope: identical(own) for scope, own in {"mean": run.cells, **by_task}.items()},
        no_label=[one for found in unlabelled.values() for one in found.values()],
        curve={task: _curve(config, own, means[task]) for task, own in by_task.items()},
        maps=[one for cell in run.cells for one in _maps(cell)],
        chosen=[one for cell in run.cells for one in chosen_by_merging(cell)],
        notes=notes,
        since=changed,
    )


def _mean(cells: Sequence[Compared], metrics: Sequence[str] | None = None) -> Resampled:
    from tasks.lamp.means import mean_over

    return mean_over([read_draws(cell) for cell in cells], metrics=metrics)


def _table(
    seed: int | None,
    cells: Mapping[str, Sequence[Cell]],
    means: Mapping[str, Resampled],
    unlabelled: Mapping[str, Mapping[str, NoLabel]],
) -> Table:
    """LaMP task -> the mean over its cells. unlabelled: of every cell, by its name."""
    from tasks.lamp.statistics import intervals

    found = {}
    for task, mean in means.items():
        main = next(name for name in PRIMARY if name in mean.points)
        listed = [unlabelled[cell.name] for cell in cells[task]]
        methods = dict.fromkeys(method for own in listed for method in own)
        found[task] = {
            "primary": main,
            "groups": mean.groups,
            "queries": mean.queries,
            "no_label": {m: fmean(own[m].share for own in listed if m in own) for m in methods},
            "scores": {
                method: {name: own[name] for name in [main, *(n for n in own if n != main)]}
                for method, own in intervals(mean).items()
            },
        }
    return Table.model_validate({"seed": seed, "cells": found})


def _differences(mean: Resampled) -> dict[str, dict[str, Difference]]:
    """method -> opponent -> the difference of `score`; of all methods, not of the optimum."""
    from tasks.lamp.statistics import differences

    methods = [name for name in mean.methods if name in METHODS]
    return {
        method: {name: Difference.model_validate(metrics["score"]) for name, metrics in own.items()}
        for method, own in differences(mean, methods).items()
        if method in methods
    }


def _costs(table: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """LaMP task -> method -> cost -> mean over seeds; and under "mean" that over all rows."""
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in table:
        if COSTS[0] in row:
            for scope in ("mean", row["lamp_task"]):
                rows.setdefault(scope, {}).setdefault(row["method"], []).append(row)

    def means(listed: list[dict[str, Any]]) -> dict[str, float]:
        return {cost: fmean(row[cost] for row in listed) for cost in COSTS}

    return {scope: {m: means(own[m]) for m in own} for scope, own in rows.items()}


def _curve(
    config: RunConfig, cells: Sequence[Cell], main: Resampled
) -> dict[str, list[CurvePoint]]:
    """Method -> its points by number of items; a number that a seed lacks is left out."""
    from tasks.lamp.statistics import intervals

    means = {}
    for items in config.items_curve:
        found = [cell.curve[items] for cell in cells if items in cell.curve]
        if len(found) == len(cells):
            means[items] = _mean(found)
    # What the tables show belongs on the curve, when it is known how many items that is.
    if means and config.split.few_shot_items is not None:
        means[config.split.few_shot_items] = main
    points: dict[str, list[CurvePoint]] = {}
    for items in sorted(means):
        for method, metrics in intervals(means[items]).items():
            point = CurvePoint.model_validate(metrics["score"] | {"items": items})
            points.setdefault(method, []).append(point)
    return points


def _maps(cell: Cell) -> Iterable[UsersMap]:
    for merging in cell.mergings:
        if file := merging.merged.bank.map:
            png = base64.b64encode(store().path(file).read_bytes()).decode()
            yield UsersMap(
                lamp_task=cell.config.lamp_task,
                seed=cell.config.seed,
                merging=merging,
                picture=f"data:image/png;base64,{png}",
            )

"""What report.html says, as one dict ready for JSON: gathered here, rendered in html.py.

Numbers of one LaMP task are means over the run's seeds; with several seeds each stands alone, too.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tasks.compare import read_draws
from tasks.config import RunConfig
from tasks.methods import METHODS
from tasks.report.answers import identical, no_labels
from tasks.report.chosen import chosen_by_merging
from tasks.store.artifacts import Store

if TYPE_CHECKING:
    from tasks.lamp.statistics import Resampled

# Answers of no model, in worlds whose optimum is known, from the least to the most knowing.
REFERENCES = ("nonpersonal", "bayes", "oracle")
# A cell's main metric is the first of these that it has.
PRIMARY = ("accuracy", "mae", "rougeL")
OVERALL = ("cells", "groups", "queries", "intervals")
COSTS = ("bytes_per_user", "steps_per_user", "tokens_per_user", "seconds_per_user")


def report_data(
    config: RunConfig,
    about: dict[str, str],
    summaries: list[dict[str, Any]],
    mean: dict[str, Any],
    table: list[dict[str, Any]],
    said: dict[str, Any],
    where: Store,
) -> dict[str, Any]:
    """Everything the report shows; of texts, only answers of methods: nothing that a user wrote.

    about: `name` and `date` of the run. summaries: one per LaMP task and seed, as the flow has
    them. mean: the `overall` result. table: `report.rows` of all summaries (their costs are taken).
    said: `notes`, `missing`, and `since` (since.py). Raises InputError when a result is gone from
    the store.

    An estimate is {"point", "lo", "hi"}, each a number or None; a difference has "holds", too.
    `tables`: scores by seed (None: mean over seeds), LaMP task, method, metric; the main metric
    comes first; `no_label` is by method. `differences`: `score` by LaMP task (or "mean"), method,
    opponent; `identical`: by the same, groups of methods that answered alike. `no_label`: as
    `answers.no_labels`, per LaMP task, seed and method. `curve`: `score` by LaMP task and method, a
    point per number of items.
    """
    by_task: dict[str, list[dict[str, Any]]] = {}
    for summary in summaries:
        by_task.setdefault(summary["lamp_task"], []).append(summary)
    cells = {task: _mean(where, [s["compared"] for s in own]) for task, own in by_task.items()}
    unlabelled = _unlabelled(summaries, where)
    tables = [{"seed": None, **_table(cells, unlabelled)}]
    if len(config.all_seeds) > 1:
        tables += _per_seed(config, summaries, unlabelled, where)
    scored = {name for cell in cells.values() for name in cell.methods}
    overall = _mean(where, [one["compared"] for one in summaries], metrics=("score",))
    return {
        "about": about
        | {"data": config.data, "preset": config.preset, "base": config.base.model}
        | {"seeds": config.all_seeds, "lamp_tasks": list(by_task)}
        | {"items": config.split.few_shot_items},
        # As they are listed everywhere else, whatever order they were asked in.
        "methods": [name for name in METHODS if name in scored],
        "references": [name for name in REFERENCES if name in scored],
        "tables": tables,
        "overall": {name: mean["value"][name] for name in OVERALL},
        "costs": _costs(table),
        "differences": {
            scope: _differences(cell) for scope, cell in {"mean": overall, **cells}.items()
        },
        "identical": {
            scope: identical(own, where) for scope, own in {"mean": summaries, **by_task}.items()
        },
        "no_label": unlabelled,
        "curve": {task: _curve(config, own, cells[task], where) for task, own in by_task.items()},
        "maps": [one for summary in summaries for one in _maps(summary, where)],
        "chosen": [
            _of(summary) | one for summary in summaries for one in chosen_by_merging(summary, where)
        ],
        "audit": [_audit(summary) for summary in summaries],
        **said,
        "config": config.model_dump(mode="json"),
    }


def _mean(
    where: Store, cells: list[dict[str, Any]], metrics: Sequence[str] | None = None
) -> Resampled:
    from tasks.lamp.means import mean_over

    return mean_over([read_draws(where, cell) for cell in cells], metrics=metrics)


def _table(cells: dict[str, Resampled], unlabelled: list[dict[str, Any]]) -> dict[str, Any]:
    from tasks.lamp.statistics import intervals

    found = {}
    for task, cell in cells.items():
        main = next(name for name in PRIMARY if name in cell.points)
        found[task] = {
            "primary": main,
            "groups": cell.groups,
            "queries": cell.queries,
            "no_label": _shares([one for one in unlabelled if one["lamp_task"] == task]),
            "scores": {
                method: {name: own[name] for name in [main, *(n for n in own if n != main)]}
                for method, own in intervals(cell).items()
            },
        }
    return {"cells": found}


def _of(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: summary[name] for name in ("lamp_task", "seed")}


def _unlabelled(summaries: list[dict[str, Any]], where: Store) -> list[dict[str, Any]]:
    return [
        _of(summary) | {"method": method, **one}
        for summary in summaries
        for method, one in no_labels(summary, where).items()
    ]


def _per_seed(
    config: RunConfig,
    summaries: list[dict[str, Any]],
    unlabelled: list[dict[str, Any]],
    where: Store,
) -> Iterable[dict[str, Any]]:
    for seed in config.all_seeds:
        of_seed = {s["lamp_task"]: s["compared"] for s in summaries if s["seed"] == seed}
        alone = {task: _mean(where, [cell]) for task, cell in of_seed.items()}
        if alone:
            own = [one for one in unlabelled if one["seed"] == seed]
            yield {"seed": seed, **_table(alone, own)}


def _shares(unlabelled: list[dict[str, Any]]) -> dict[str, float]:
    """method -> mean over seeds."""
    shares: dict[str, list[float]] = {}
    for one in unlabelled:
        shares.setdefault(one["method"], []).append(one["share"])
    return {method: sum(own) / len(own) for method, own in shares.items()}


def _differences(cell: Resampled) -> dict[str, dict[str, Any]]:
    """method -> opponent -> the difference of `score`; of all methods, not of the optimum."""
    from tasks.lamp.statistics import differences

    methods = [name for name in cell.methods if name in METHODS]
    return {
        method: {opponent: metrics["score"] for opponent, metrics in own.items()}
        for method, own in differences(cell, methods).items()
        if method in methods
    }


def _costs(table: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """LaMP task -> method -> cost -> mean over seeds; and under "mean" that over all rows."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in table:
        if COSTS[0] in row:
            for scope in ("mean", row["lamp_task"]):
                rows.setdefault((scope, row["method"]), []).append(row)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (scope, method), own in rows.items():
        found.setdefault(scope, {})[method] = {
            cost: sum(row[cost] for row in own) / len(own) for cost in COSTS
        }
    return found


def _curve(
    config: RunConfig, summaries: list[dict[str, Any]], main: Resampled, where: Store
) -> dict[str, list[dict[str, Any]]]:
    """Method -> its points by number of items; a number that a seed lacks is left out."""
    from tasks.lamp.statistics import intervals

    cells = {}
    for items in config.items_curve:
        found = [summary["curve"].get(items) for summary in summaries]
        refs = [one["ref"] for one in found if one]
        if len(refs) == len(found):
            cells[items] = _mean(where, [_cell(where, ref) for ref in refs])
    # What the tables show belongs on the curve, when it is known how many items that is.
    if cells and config.split.few_shot_items is not None:
        cells[config.split.few_shot_items] = main
    points: dict[str, list[dict[str, Any]]] = {}
    for items in sorted(cells):
        for method, metrics in intervals(cells[items]).items():
            points.setdefault(method, []).append({"items": items, **metrics["score"]})
    return points


def _cell(where: Store, ref: Any) -> dict[str, Any]:
    return {"ref": ref, "value": where.open(ref).value}


def _maps(summary: dict[str, Any], where: Store) -> Iterable[dict[str, Any]]:
    for method, own in summary["banks"].items():
        if own["map"] is None:
            continue
        picture = (where.open(own["map"]["ref"]).folder / "map.png").read_bytes()
        chosen = own["anchors"]["value"]
        yield {
            "lamp_task": summary["lamp_task"],
            "seed": summary["seed"],
            "methods": [name for name, bank in summary["bank_of"].items() if bank == method],
            **{name: chosen[name] for name in ("candidates", "clusters", "noise")},
            "anchors": len(own["bank"]["value"]["users"]),
            "png": base64.b64encode(picture).decode(),
        }


def _audit(summary: dict[str, Any]) -> dict[str, Any]:
    """Counts only: labels, ids and texts of the data stay out."""
    value = summary["prepared"]["value"]
    audit = value["audit"]
    golds = audit["labels"]["golds"]
    return {
        "lamp_task": summary["lamp_task"],
        "seed": summary["seed"],
        "counts": value["counts"],
        "dropped": value["dropped"],
        "groups": audit["groups"]["few_shot"],
        "queries": audit["queries"]["few_shot"],
        "duplicates": audit["duplicates"],
        "majority_share": golds["majority_share"] if golds else None,
        "profile_lengths": audit["profile_lengths"],
    }

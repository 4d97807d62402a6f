"""report.html: from the dict of data.py to one self-contained page. Pure: no file is read.

Every figure in a table is also in its cell's attributes (`data-task`, `data-method`,
`data-metric`, `data-value` and so on), unrounded. Text that comes from data is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from tasks.report.answers import no_label_section
from tasks.report.differences import differences_section, leaders
from tasks.report.page import folded, page, row, section, small, table, tag
from tasks.report.pictures import AXES, audit, bar_charts, curve_charts, maps, merging, method_head
from tasks.report.since import since_section
from tasks.report.table import BELOW_ZERO
from tasks.report.words import facts, number, verdict

MAIN = {**AXES, "mae": "MAE, less is better"}
SHARE = "share_of_attainable"
COST_NAMES = {
    "bytes_per_user": "bytes stored",
    "steps_per_user": "optimiser steps",
    "tokens_per_user": "training tokens",
    "seconds_per_user": "seconds",
}
Estimate = Mapping[str, float | None]


def report_html(data: dict[str, Any]) -> str:
    """The page of `data.report_data`'s dict. The same dict gives the same bytes."""
    return page(
        f"{data['about']['name']}: comparison of methods",
        "\n".join(
            [
                _head(data),
                _scores(data),
                no_label_section(data["no_label"]),
                since_section(data["since"]),
                section("Score per LaMP task", bar_charts(data)),
                differences_section(data),
                section("Score by number of items", curve_charts(data)),
                _costs(data),
                section("What merging chose", merging(data)),
                section("Users, clusters and anchors", maps(data)),
                section("The data, and what to know of it", _notes(data["notes"]), audit(data)),
                section(
                    "Configuration",
                    folded(
                        "The resolved configuration as JSON",
                        f"<pre>{escape(json.dumps(data['config'], indent=2))}</pre>",
                    ),
                ),
            ]
        ),
    )


def _head(data: dict[str, Any]) -> str:
    parts = [f"<h1>{escape(data['about']['name'])}</h1>", tag("p", verdict(data), class_="verdict")]
    if data["missing"]:
        listed = "".join(f"<li>{escape(line)}</li>" for line in data["missing"])
        title = f"<strong>MISSING: {len(data['missing'])} pieces of this run are not here</strong>"
        parts.append(tag("div", f"{title}<ul>{listed}</ul>", class_="box", id="missing"))
    told = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts(data)
    )
    parts.append(f'<dl class="facts">{told}</dl>')
    return tag("section", "\n".join(parts))


def _scores(data: dict[str, Any]) -> str:
    first, *per_seed = data["tables"]
    names = ["mean over seeds" if per_seed else "", *(f"seed {one['seed']}" for one in per_seed)]
    parts = [
        "<p>With 95% intervals, from drawing the groups of users again; an interval belongs to the "
        "one number beside it, differences have their own below. Bold: the best, and what is not "
        "shown to be worse. <em>Set apart</em>: answers of no model, where the best that can be "
        "known is known: <em>nonpersonal</em> knows the population, <em>bayes</em> also the "
        "user's items, <em>oracle</em> the user.</p>",
        "<h3>Main metric</h3>",
        _main_table(data, first, primary=True),
    ]
    if any(SHARE in own for one in first["cells"].values() for own in one["scores"].values()):
        parts += [
            "<h3>Share of the attainable</h3>",
            "<p>(score - nonpersonal) / (bayes - nonpersonal): 0% is what can be had without "
            "knowing the user, 100% the best that can be done with the user's items. "
            f"{escape(BELOW_ZERO)}.</p>",
            _main_table(data, first, primary=False),
        ]
    for one in per_seed:
        inner = _main_table(data, one, primary=True, mean=False)
        parts.append(folded(f"Main metric with seed {one['seed']}", inner))
    for one, name in zip(data["tables"], names, strict=True):
        parts.append(
            folded(
                f"All metrics, {name}" if name else "All metrics",
                "".join(_all_metrics(data, one, task) for task in one["cells"]),
            )
        )
    return section("Scores", *parts)


def _main_table(
    data: dict[str, Any],
    one: dict[str, Any],
    primary: bool,
    mean: bool = True,
) -> str:
    """Methods x LaMP tasks: the main metric of each, or the share of the attainable."""
    seed = one["seed"]
    columns: list[tuple[str, str, str, dict[str, Any], str]] = []
    for task, own in one["cells"].items():
        metric = own["primary"] if primary else SHARE
        about = MAIN.get(metric, metric) if primary else f"{own['groups']} groups"
        columns.append((task, task, metric, own["scores"], about))
    if mean:
        value = data["overall"]
        columns.append(
            ("mean", f"mean of {value['cells']}", "score" if primary else SHARE,
             value["intervals"], "score" if primary else f"{value['groups']} groups")
        )  # fmt: skip
    head = ["<th>method</th>"] + [
        tag("th", escape(title) + small(about), class_="mean" if task == "mean" else None)
        for task, title, _, _, about in columns
    ]
    # What differences are known of: not one seed alone, and no shares.
    best = {task: leaders(data, task) for task, *_ in columns} if primary and seed is None else {}

    def line(method: str) -> str:
        cells = [method_head(method)]
        for task, _, metric, found, _ in columns:
            looks = {"mean": task == "mean", "best": method in best.get(task, [])}
            look = " ".join(name for name, there in looks.items() if there)
            one_of = found.get(method, {}).get(metric)
            share = one["cells"].get(task, {}).get("no_label", {}).get(method)
            remark = f"{share:.0%} no label" if primary and share else ""
            cells.append(
                _cell(one_of, task, method, metric, seed, not primary, look or None, remark)
            )
        return row(cells)

    return table(head, list(map(line, data["methods"])), list(map(line, data["references"])))


def _all_metrics(data: dict[str, Any], one: dict[str, Any], task: str) -> str:
    own = one["cells"][task]
    metrics = list(dict.fromkeys(name for found in own["scores"].values() for name in found))
    head = ["<th>method</th>"] + [f"<th>{escape(AXES.get(name, name))}</th>" for name in metrics]
    if own["no_label"]:
        head.append("<th>no label</th>")

    def line(method: str) -> str:
        found = own["scores"].get(method, {})
        cells = [
            _cell(found.get(name), task, method, name, one["seed"], share=name == SHARE)
            for name in metrics
        ]
        if own["no_label"]:
            share = own["no_label"].get(method)
            about = {"data_task": task, "data_method": method, "data_seed": one["seed"]}
            text = "-" if share is None else f"{share:.1%}"
            cells.append(tag("td", text, **about, data_metric="no_label", data_value=share))
        return row([method_head(method), *cells])

    title = f"<h3>{escape(task)}</h3>" + small(
        f"{own['queries']} queries of {own['groups']} groups of users"
    )
    return title + table(
        head, list(map(line, data["methods"])), list(map(line, data["references"]))
    )


def _costs(data: dict[str, Any]) -> str:
    found = data["costs"]
    if not found:
        return ""
    head = ["<th>method</th>"] + [f"<th>{escape(name)}</th>" for name in COST_NAMES.values()]

    def of(task: str) -> str:
        lines = []
        for method in data["methods"]:
            if method in found[task]:
                cells = [
                    tag("td", number(cost, found[task][method][cost]), data_task=task,
                        data_method=method, data_metric=cost,
                        data_value=repr(found[task][method][cost]))
                    for cost in COST_NAMES
                ]  # fmt: skip
                lines.append(row([method_head(method), *cells]))
        return table(head, lines, full=False)

    tasks = [task for task in found if task != "mean"]
    return section(
        "Cost per user",
        "<p>Mean over users, LaMP tasks and seeds. Stored: the recipe, the user's own LoRA, the "
        "history where it is looked up to answer; the bank is shared and not counted. Seconds: "
        "evidence, training and answering as measured when the work was done.</p>",
        of("mean"),
        folded("Per LaMP task", "".join(f"<h3>{escape(t)}</h3>{of(t)}" for t in tasks)),
    )


def _notes(lines: list[str]) -> str:
    listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">{listed}</ul>' if listed else ""


def _cell(
    one: Estimate | None,
    task: str,
    method: str,
    metric: str,
    seed: int | None,
    share: bool = False,
    class_: str | None = None,
    remark: str = "",
) -> str:
    point, lo, hi = ((one or {}).get(key) for key in ("point", "lo", "hi"))
    shown = "-"
    if point is not None:
        shown = f"{point:.1%}" if share else f"{point:.3f}"
        bounds = "-"
        if lo is not None and hi is not None:
            bounds = f"[{lo:.0%}, {hi:.0%}]" if share else f"[{lo:.3f}, {hi:.3f}]"
        shown += small(bounds) + (small(remark) if remark else "")
    return tag(
        "td",
        shown,
        class_=class_,
        data_task=task,
        data_method=method,
        data_metric=metric,
        data_seed=seed,
        data_value=_raw(one, "point"),
        data_lo=_raw(one, "lo"),
        data_hi=_raw(one, "hi"),
    )


def _raw(one: Estimate | None, key: str) -> str | None:
    value = (one or {}).get(key)
    return None if value is None else repr(value)

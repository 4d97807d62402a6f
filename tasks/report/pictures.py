"""The parts of report.html that are pictures or stand beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tasks.report.charts import LINES, bars, curves, heat, style
from tasks.report.page import folded, picture, pictures, row, table, tag

AXES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "mae": "MAE",
    "rmse": "RMSE",
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
    "share_of_attainable": "share of the attainable",
}
# Of what merging chose: the recipes' own share, and what equal weights would give.
SHARES = ("own", "equal_chosen", "equal_all")
# What `score` is, by the main metric.
SCORES = {"mae": "score = 1 - MAE / 4", "accuracy": "score = accuracy", "rougeL": "score = ROUGE-L"}


def bar_charts(data: dict[str, Any]) -> str:
    """One chart of `score` per LaMP task, and one of the mean: a longer bar is a better one.

    The number beside a bar names the main metric, too, where that is another.
    """
    shown = []
    charts = [
        (task, own["primary"], own["scores"]) for task, own in data["tables"][0]["cells"].items()
    ]
    if len(charts) > 1:
        charts.append(
            (f"Mean of {data['overall']['cells']}", "score", data["overall"]["intervals"])
        )
    order = [*data["methods"], *(name for name in data["references"] if name != "oracle")]
    for title, metric, scores in charts:
        found = {name: scores[name] for name in order if name in scores}
        estimates = {name: own["score"] for name, own in found.items()}
        numbers = {name: _number(one["point"]) for name, one in estimates.items()}
        if metric == "mae":
            numbers = {
                name: f"{number}\nMAE {_number(found[name]['mae']['point'])}"
                for name, number in numbers.items()
            }
        axis = SCORES.get(metric, metric)
        alt = f"{title}, {axis} by method: " + "; ".join(
            f"{name} {' '.join(numbers[name].split())}{_from_to(one)}"
            for name, one in estimates.items()
        )
        shown.append(picture(bars(title, axis, estimates, numbers), alt))
    return pictures(shown)


def curve_charts(data: dict[str, Any]) -> str:
    """One chart per LaMP task that has a curve."""
    shown = []
    order = [*data["methods"], *(name for name in data["references"] if name != "oracle")]
    for task, found in data["curve"].items():
        points = {name: found[name] for name in order if name in found}
        if points:
            axis = SCORES[data["tables"][0]["cells"][task]["primary"]]
            alt = f"{task}, {axis} by number of items: " + "; ".join(
                f"{name} "
                + ", ".join(f"{_number(one['point'])} with {one['items']}" for one in own)
                for name, own in points.items()
            )
            shown.append(picture(curves(task, axis, points), alt))
    if not shown:
        return ""
    told = (
        "<p>The anchors and their LoRAs stay the same; only what each few-shot user brings "
        "changes. More is better. Vertical lines are 95% intervals.</p>"
    )
    return told + pictures(shown)


def maps(data: dict[str, Any]) -> str:
    """Users on two principal components, per bank; further seeds are folded."""
    by_seed: dict[int, list[str]] = {}
    for one in data["maps"]:
        methods = ", ".join(one["methods"])
        alt = (
            f"{one['lamp_task']}, bank of {methods}: users on two principal components, "
            f"{one['candidates']} anchor candidates in {one['clusters']} clusters, "
            f"{one['noise']} noise, {one['anchors']} anchors"
        )
        drawn = picture(f"data:image/png;base64,{one['png']}", alt, f"Bank of {methods}")
        by_seed.setdefault(one["seed"], []).append(drawn)
    return _by_seed({seed: pictures(own) for seed, own in by_seed.items()})


def merging(data: dict[str, Any]) -> str:
    """How much weight goes to anchors of the user's own sort, and the whole of it as heat maps."""
    if not data["chosen"]:
        return ""
    by = data["chosen"][0]["by"]
    if by == "archetype":
        told = (
            "In this generated world each user's true first archetype is known (the methods do not "
            "see it). A heat map shows where the recipes' weight goes: rows are few-shot users, "
            "columns anchors, by first archetype; a row sums to 1."
        )
        own_sort = "anchors of the user's own first archetype"
    else:
        told = (
            "Nobody's true taste is known here. A heat map shows where the recipes' weight goes: "
            "rows are few-shot users by the cluster of their most similar anchor, columns the "
            "anchors' clusters; a row sums to 1."
        )
        own_sort = "anchors in the cluster of the user's most similar anchor"
    head = [
        "<th>LaMP task</th>",
        '<th class="text">bank of</th>',
        "<th>weight on own</th>",
        "<th>equal weights on the same anchors</th>",
        "<th>equal weights on all anchors</th>",
    ]
    by_seed: dict[int, list[str]] = {}
    banks: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in data["chosen"]:
        methods = ", ".join(one["methods"])
        banks.setdefault((methods, one["lamp_task"]), []).append(one)
        by_seed.setdefault(one["seed"], []).append(_heat(one, methods))
    lines = []
    for (methods, task), own in sorted(banks.items(), key=lambda bank: bank[0][0]):
        shares = [
            tag("td", f"{share:.1%}", data_task=task, data_method=own[0]["methods"][0],
                data_metric=f"weight_{key}", data_value=repr(share))
            for key, share in zip(SHARES, _shares(own), strict=True)
        ]  # fmt: skip
        bank = tag("td", escape(methods), class_="text")
        lines.append(row([tag("th", escape(task), scope="row"), bank, *shares]))
    told += "".join(
        f" Bank of {escape(methods)}: <strong>{own:.0%}</strong> of the weight goes to {own_sort}; "
        f"equal weights on the same anchors would give {chosen:.0%}, on all anchors {every:.0%}."
        for methods in sorted({methods for methods, _ in banks})
        for own, chosen, every in [
            _shares([one for bank, listed in banks.items() if bank[0] == methods for one in listed])
        ]
    )
    heats = _by_seed({seed: pictures(own) for seed, own in by_seed.items()})
    return f"<p>{told}</p>{table(head, lines)}{heats}"


def audit(data: dict[str, Any]) -> str:
    """What the data are: users, authors, what was dropped, queries that stand in profiles."""
    head = ["<th>LaMP task</th>", "<th>seed</th>"] + [
        f"<th>{name}</th>"
        for name in (
            "base users", "anchor candidates", "few-shot users", "groups of them", "queries",
            "items of a few-shot user", "queries whose text is in a profile", "with its gold",
            "commonest gold", "items dropped",
        )
    ]  # fmt: skip
    lines, dropped = [], []
    for one in data["audit"]:
        counts, asked = one["counts"], one["queries"]
        lengths = one["profile_lengths"]["few_shot"]
        share = one["majority_share"]
        values = [
            counts["base_users"], counts["anchor_candidates"], counts["few_shot_users"],
            counts["few_shot_groups"], counts["queries"],
            f"{lengths['min']} to {lengths['max']}" if lengths else "-",
            f"{asked['text']['any']} of {asked['asked']}", asked["text_and_answer"]["any"],
            "-" if share is None else f"{share:.1%}", sum(one["dropped"].values()),
        ]  # fmt: skip
        cells = [f"<td>{escape(str(value))}</td>" for value in [one["seed"], *values]]
        lines.append(row([tag("th", escape(one["lamp_task"]), scope="row"), *cells]))
        dropped += [
            f"{one['lamp_task']}, seed {one['seed']}: {count} x {reason}"
            for reason, count in one["dropped"].items()
        ]
    listed = "".join(f"<li>{escape(line)}</li>" for line in dropped)
    told = (
        "<p>A group is all users that share content; groups stand on one side only, and are what "
        "is drawn again for the intervals. Items are counted before any limit on them. Commonest "
        "gold: what always giving the commonest answer would score.</p>"
    )
    return told + table(head, lines) + folded("What was dropped", listed and f"<ul>{listed}</ul>")


def _heat(one: Mapping[str, Any], methods: str) -> str:
    title = f"{one['lamp_task']}: {methods}"
    sort = "first archetype" if one["by"] == "archetype" else "cluster"
    names = (f"anchor's {sort} (how many)", f"user's {sort} (how many)")
    rows = [f"{name} ({count})" for name, count in zip(one["rows"], one["users"], strict=True)]
    columns = [
        f"{name} ({count:.3g})" for name, count in zip(one["columns"], one["anchors"], strict=True)
    ]
    alt = f"{title}, mean weight by {names[1]} and {names[0]}: " + "; ".join(
        f"{name}: {', '.join(f'{value:.2f}' for value in own)}"
        for name, own in zip(rows, one["weights"], strict=True)
    )
    own, chosen, every = _shares([one])
    caption = f"Own {own:.1%}; equal weights on the same anchors {chosen:.1%}, on all {every:.1%}"
    return picture(heat(title, names, rows, columns, one["weights"]), alt, caption)


def _shares(listed: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """The means of SHARES."""
    return tuple(sum(one[key] for one in listed) / len(listed) for key in SHARES)


def _by_seed(parts: dict[int, str]) -> str:
    """The first seed's part as it is, the others' folded; nothing where there is none."""
    seeds = list(parts)
    return "".join(parts[seed] for seed in seeds[:1]) + "".join(
        folded(f"Seed {seed}", parts[seed]) for seed in seeds[1:]
    )


def method_head(name: str) -> str:
    """The head of a method's row, with its colour; answers of no model have none."""
    dot = (
        "" if name in LINES else tag("span", "", class_="dot", style=f"background:{style(name)[0]}")
    )
    return tag("th", dot + escape(name), scope="row")


def _from_to(one: Mapping[str, Any]) -> str:
    if one["lo"] is None or one["hi"] is None:
        return ""
    return f" from {one['lo']:.3f} to {one['hi']:.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

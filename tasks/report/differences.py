"""Differences between methods: which are shown, for the table, the verdict and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tasks.report.answers import alike
from tasks.report.page import folded, row, section, small, table, tag
from tasks.report.pictures import method_head

# What the method is to show, on the mean over LaMP tasks.
CLAIMS = (
    ("mta", "merge_only"),
    ("merge_only", "base"),
    ("mta", "oppu"),
    ("mta", "base"),
)
SAME = "the same score for every group of users"


def difference_lines(mean: dict[str, Any], groups: Sequence[Sequence[str]]) -> list[str]:
    """What is better than what, on the mean, and whether that holds.

    mean: the `overall` result. groups: methods that answered alike (`answers.identical`).
    """
    value = mean["value"]
    lines = []
    for method, opponent in CLAIMS:
        if not (one := value["differences"].get(method, {}).get(opponent, {}).get("score")):
            continue
        interval = "" if one["lo"] is None else f" [{one['lo']:+.4f}, {one['hi']:+.4f}]"
        point = "-" if one["point"] is None else f"{one['point']:+.4f}"
        verdict = {True: "holds", False: "not shown", None: "has no interval"}[one["holds"]]
        told = f"{point}{interval} {verdict}"
        if alike(groups, method, opponent):
            told = f"identical answers to all {value['queries']:,} queries"
        elif none_at_all(one):
            told = SAME
        lines.append(f"mean score, {method} - {opponent}: {told}")
    return lines


def none_at_all(one: Mapping[str, Any]) -> bool:
    """Whether a difference is 0 in every draw: no group of users tells the two apart."""
    return all(one[key] == 0 for key in ("point", "lo", "hi"))


def leaders(data: dict[str, Any], scope: str) -> list[str]:
    """The method with the highest `score`, and those not shown to be below it, as they are listed.

    scope: a LaMP task, or "mean". One alone is the best: its difference to every other holds.
    """
    found = data["overall"]["intervals"]
    if scope != "mean":
        found = data["tables"][0]["cells"][scope]["scores"]
    scores = {name: found.get(name, {}).get("score", {}).get("point") for name in data["methods"]}
    known = {name: score for name, score in scores.items() if score is not None}
    if not known:
        return []
    top = max(known, key=lambda name: known[name])
    apart = data["differences"][scope].get(top, {})
    return [name for name in known if name == top or not apart.get(name, {}).get("holds")]


def difference_text(one: Mapping[str, Any] | None, identical: bool = False) -> tuple[str, str, str]:
    """Sign, words and CSS class of a difference: told by form, by text and by colour."""
    if identical:
        return "=", "identical answers", "open"
    if one is None or one["point"] is None:
        return "", "no number", "open"
    if one["holds"] is None:
        return "○", "no interval", "open"
    if none_at_all(one):
        return "=", "same score", "open"
    if not one["holds"]:
        return "○", "not shown", "open"
    return ("▲", "better, holds", "up") if one["point"] > 0 else ("▼", "worse, holds", "down")


def differences_section(data: dict[str, Any]) -> str:
    """One matrix of the mean, and one per LaMP task behind a fold; nothing for one method."""
    tasks = [scope for scope in data["differences"] if scope != "mean"]
    if len(data["methods"]) < 2:
        return ""
    name = f"Mean of {data['overall']['cells']}" if data["overall"]["cells"] > 1 else tasks[0]
    parts = [f"<h3>{escape(name)}</h3>", _matrix(data, "mean")]
    if len(tasks) > 1:
        per_task = "".join(f"<h3>{escape(task)}</h3>{_matrix(data, task)}" for task in tasks)
        parts.append(folded("Per LaMP task", per_task))
    return section(
        "Differences between methods",
        "<p>The method of the row minus that of the column, in <em>score</em> (accuracy, "
        "1 - MAE / 4 or ROUGE-L, so more is better), on the same draws of the same users. A "
        "difference <em>holds</em> when its 95% interval excludes 0: ▲ better, ▼ worse. Otherwise "
        "it is <em>not shown</em>: ○. Where no user tells two methods apart stands =. Each "
        "interval stands for itself; of so many, some exclude 0 by chance.</p>",
        *parts,
    )


def _matrix(data: dict[str, Any], scope: str) -> str:
    """Rows minus columns, below the diagonal: above it the same would stand with other signs."""
    methods = data["methods"]
    head = ["<th>method</th>", *(f"<th>{escape(name)}</th>" for name in methods[:-1])]
    lines = []
    for number, method in enumerate(methods[1:], 1):
        cells = [_cell(data, scope, method, opponent) for opponent in methods[:number]]
        empty = ["<td></td>"] * (len(methods) - 1 - number)
        lines.append(row([method_head(method), *cells, *empty]))
    return table(head, lines)


def _cell(data: dict[str, Any], scope: str, method: str, opponent: str) -> str:
    one = data["differences"][scope].get(method, {}).get(opponent)
    identical = alike(data["identical"][scope], method, opponent)
    sign, word, look = difference_text(one, identical)
    shown = f"{sign} -" if one is None or one["point"] is None else f"{sign} {one['point']:+.3f}"
    interval = ""
    if sign == "=":
        shown = sign
    elif one and one["lo"] is not None and one["hi"] is not None:
        interval = small(f"[{one['lo']:+.3f}, {one['hi']:+.3f}]")
    raw = {key: None if one is None else one[key] for key in ("point", "lo", "hi", "holds")}
    return tag(
        "td",
        f"{tag('span', shown, class_=look)}{interval}{small(word)}",
        data_task=scope,
        data_method=method,
        data_opponent=opponent,
        data_metric="difference",
        data_value=raw["point"],
        data_lo=raw["lo"],
        data_hi=raw["hi"],
        data_holds=None if raw["holds"] is None else str(raw["holds"]).lower(),
    )

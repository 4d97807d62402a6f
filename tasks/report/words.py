"""What report.html says in words: the verdict, the facts of the run, numbers as they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from tasks.report.table import CLAIMS


def verdict(data: dict[str, Any]) -> str:
    """One paragraph (HTML) made of the numbers: the best method, and which differences hold."""
    value = data["overall"]
    known = {
        name: value["intervals"][name]
        for name in data["methods"]
        if value["intervals"].get(name, {}).get("score", {}).get("point") is not None
    }
    about = data["about"]
    tasks, seeds = len(about["lamp_tasks"]), len(about["seeds"])
    what = f"the mean of {value['cells']} scores"
    if value["cells"] == tasks * seeds:
        what = f"the mean of {tasks} LaMP tasks" if tasks > 1 else about["lamp_tasks"][0]
        what += f" and {seeds} seeds" if seeds > 1 else ""
    what = (
        f"On {escape(what)} ({value['queries']:,} queries of {value['groups']:,} groups of users)"
    )
    parts = []
    if known:
        best = max(known, key=lambda name: known[name]["score"]["point"])
        told = f"{what} the best method is <strong>{escape(best)}</strong> with a score of "
        told += _estimate(known[best]["score"])
        share = known[best].get("share_of_attainable")
        if share and share["point"] is not None:
            told += f", {share['point']:.0%} of the attainable"
        parts.append(told + ".")
    held, open_ones = [], []
    for method, opponent in CLAIMS:
        one = data["differences"]["mean"].get(method, {}).get(opponent)
        if one is None or one["point"] is None:
            continue
        pair = f"{escape(method)} and {escape(opponent)}"
        if one["holds"]:
            word = "better" if one["point"] > 0 else "worse"
            held.append(
                f"<strong>{escape(method)}</strong> is {word} than {escape(opponent)} by "
                + _estimate(one | {"point": abs(one["point"])}, flip=one["point"] < 0)
            )
        else:
            why = "" if one["holds"] is False else ", no interval"
            open_ones.append(f"{pair} ({one['point']:+.3f}{_interval(one, '+.3f')}{why})")
    if held:
        parts.append(f"These differences hold: {'; '.join(held)}.")
    if open_ones:
        parts.append(f"Not shown to differ: {'; '.join(open_ones)}.")
    return " ".join(parts) or "Nothing was scored."


def difference_text(one: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """Sign, words and CSS class of a difference: told by form, by text and by colour."""
    if one is None or one["point"] is None:
        return "", "no number", "open"
    if one["holds"] is None:
        return "○", "no interval", "open"
    if not one["holds"]:
        return "○", "does not hold", "open"
    return ("▲", "better, holds", "up") if one["point"] > 0 else ("▼", "worse, holds", "down")


def facts(data: dict[str, Any]) -> list[tuple[str, str]]:
    """What was run on what, as names and texts (not HTML)."""
    about = data["about"]
    items = about["items"]
    return [
        ("Date", about["date"]),
        ("Data", about["data"]),
        ("Preset", about["preset"]),
        ("Base model", about["base"]),
        ("Seeds", ", ".join(map(str, about["seeds"]))),
        ("LaMP tasks", ", ".join(about["lamp_tasks"])),
        ("Methods", ", ".join(data["methods"])),
        ("Items per few-shot user", "all there are" if items is None else f"at most {items}"),
    ]


def seed_lines(summaries: Iterable[Mapping[str, Any]]) -> list[str]:
    """How far seeds lie apart, which no interval contains: each has trained a model of its own.

    Means over LaMP tasks of each seed in which all of them were scored; nothing for one seed.
    """
    cells: dict[int, dict[str, Any]] = {}
    for one in summaries:
        found = one["compared"]["value"]["intervals"]
        cells.setdefault(one["seed"], {})[one["lamp_task"]] = found
    every = max((set(own) for own in cells.values()), key=len, default=set())
    cells = {seed: own for seed, own in cells.items() if set(own) == every}
    if len(cells) < 2:
        return []

    def means(metric: str, method: str) -> list[float]:
        """One number per seed; none where a cell has none."""
        values = [
            [found.get(method, {}).get(metric, {}).get("point") for found in own.values()]
            for own in cells.values()
        ]
        if any(value is None for row in values for value in row):
            return []
        return [sum(row) / len(row) for row in values]

    lines = []
    for method, opponent in CLAIMS:
        pairs = zip(means("score", method), means("score", opponent), strict=False)
        if shown := ", ".join(f"{own - other:+.4f}" for own, other in pairs):
            lines.append(f"mean score, {method} - {opponent}: {shown}")
    if shown := ", ".join(f"{share:.3f}" for share in means("share_of_attainable", "mta")):
        lines.append(f"share of the attainable, mta: {shown}")
    seeds = ", ".join(map(str, cells))
    return [f"by seed ({seeds}), which no interval contains: {line}" for line in lines]


def number(cost: str, value: float) -> str:
    """A cost as it is read: whole numbers, seconds with three places."""
    return f"{value:,.3f}" if cost == "seconds_per_user" else f"{value:,.0f}"


def _estimate(one: Mapping[str, Any], flip: bool = False) -> str:
    if flip and one["lo"] is not None:
        one = {**one, "lo": -one["hi"], "hi": -one["lo"]}
    return f"{one['point']:.3f}{_interval(one, '.3f')}"


def _interval(one: Mapping[str, Any], form: str) -> str:
    if one["lo"] is None or one["hi"] is None:
        return ""
    return f" [{one['lo']:{form}}, {one['hi']:{form}}]"

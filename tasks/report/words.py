"""What report.html says in words: the verdict, the facts of the run, numbers as they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from tasks.report.answers import alike
from tasks.report.differences import CLAIMS, SAME, leaders, none_at_all


def verdict(data: dict[str, Any]) -> str:
    """One paragraph (HTML) made of the numbers: what is best, and which differences hold.

    A method is called the best only where its difference to every other one holds.
    """
    queries = data["overall"]["queries"]
    parts = [_leaders(data)] if leaders(data, "mean") else []
    parts += [
        f"{_names(group)} gave identical answers to all {queries:,} queries."
        for group in data["identical"]["mean"]
    ]
    held, open_ones = [], []
    for method, opponent in CLAIMS:
        one = data["differences"]["mean"].get(method, {}).get(opponent)
        if (
            one is None
            or one["point"] is None
            or alike(data["identical"]["mean"], method, opponent)
        ):
            continue
        pair = f"{escape(method)} and {escape(opponent)}"
        if one["holds"]:
            word = "better" if one["point"] > 0 else "worse"
            held.append(
                f"<strong>{escape(method)}</strong> is {word} than {escape(opponent)} by "
                + _estimate(one | {"point": abs(one["point"])}, flip=one["point"] < 0)
            )
        elif none_at_all(one):
            open_ones.append(f"{pair} ({SAME})")
        else:
            why = "" if one["holds"] is False else ", no interval"
            open_ones.append(f"{pair} ({one['point']:+.3f}{_interval(one, '+.3f')}{why})")
    if held:
        parts.append(f"These differences hold: {'; '.join(held)}.")
    if open_ones:
        parts.append(f"Not shown to differ: {'; '.join(open_ones)}.")
    return " ".join(parts) or "Nothing was scored."


def _leaders(data: dict[str, Any]) -> str:
    """Who is best on what, or who is not told apart from the highest score."""
    value, about = data["overall"], data["about"]
    tasks, seeds = len(about["lamp_tasks"]), len(about["seeds"])
    what = f"the mean of {value['cells']} scores"
    if value["cells"] == tasks * seeds:
        what = f"the mean of {tasks} LaMP tasks" if tasks > 1 else about["lamp_tasks"][0]
        what += f" and {seeds} seeds" if seeds > 1 else ""
    what = f"{escape(what)} ({value['queries']:,} queries of {value['groups']:,} groups of users)"
    names = leaders(data, "mean")
    scores = {name: _estimate(value["intervals"][name]["score"]) for name in names}
    if len(names) > 1:
        shown = _listed([f"<strong>{escape(name)}</strong> ({scores[name]})" for name in names])
        return f"On {what} no method is shown to be the best: {shown} are not told apart."
    share = value["intervals"][names[0]].get("share_of_attainable")
    told = f"On {what} the best method is <strong>{escape(names[0])}</strong> with a score of "
    if len(data["methods"]) == 1:
        told = f"On {what} the method <strong>{escape(names[0])}</strong> has a score of "
    told += scores[names[0]]
    if share and share["point"] is not None:
        told += f", {share['point']:.0%} of the attainable"
        told += ": worse than the best answers that ignore who asks" * (share["point"] < 0)
    return f"{told}."


def _names(names: Sequence[str]) -> str:
    return _listed([escape(name) for name in names])


def _listed(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


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

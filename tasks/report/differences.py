"""Differences between methods: which are shown, for the table, the verdict and the page."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.report.answers import alike
from tasks.report.page_data import ReportData
from tasks.results.models import Compared, Difference

# What the method is to show, on the mean over LaMP tasks.
CLAIMS = (("mta", "merge_only"), ("merge_only", "base"), ("mta", "oppu"), ("mta", "base"))
SAME = "the same score for every group of users"


def difference_lines(mean: Compared, groups: Sequence[Sequence[str]]) -> list[str]:
    """What is better than what, on the mean, and whether that holds.

    mean: the `overall` result. groups: methods that answered alike (`answers.identical`).
    """
    lines = []
    for method, opponent in CLAIMS:
        if not (one := mean.differences.get(method, {}).get(opponent, {}).get("score")):
            continue
        verdict = {True: "holds", False: "not shown", None: "has no interval"}[one.holds]
        told = f"{one.text('+.4f')} {verdict}"
        if alike(groups, method, opponent):
            told = f"identical answers to all {mean.queries:,} queries"
        elif none_at_all(one):
            told = SAME
        lines.append(f"mean score, {method} - {opponent}: {told}")
    return lines


def claims(data: ReportData) -> list[tuple[str, str, Difference]]:
    """Method, opponent, difference: of CLAIMS that were run, and not of identical answers."""
    mean, identical = data.differences["mean"], data.identical["mean"]
    return [
        (method, opponent, mean[method][opponent])
        for method, opponent in CLAIMS
        if opponent in mean.get(method, {}) and not alike(identical, method, opponent)
    ]


def none_at_all(difference: Difference) -> bool:
    """Whether a difference is 0 in every draw: no group of users tells the two apart."""
    return difference.point == difference.lo == difference.hi == 0


def leaders(data: ReportData, scope: str) -> list[str]:
    """The method with the highest `score`, and those not shown to be below it, as they are listed.

    scope: a LaMP task, or "mean". One alone is the best: its difference to every other holds.
    """
    intervals = data.overall.intervals
    if scope != "mean":
        intervals = data.tables[0].cells[scope].scores
    scores = {
        name: point
        for name in data.methods
        if name in intervals and (point := intervals[name]["score"].point) is not None
    }
    if not scores:
        return []
    top = max(scores, key=lambda name: scores[name])
    differences = data.differences[scope].get(top, {})
    below = [name for name, difference in differences.items() if difference.holds]
    return [name for name in scores if name == top or name not in below]

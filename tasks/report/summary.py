"""A run in a few lines of plain text, for where no page is: what ran, and what came out."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from tasks.adapted import coverage_notes
from tasks.config.run import RunConfig
from tasks.report.differences import CLAIMS
from tasks.report.html import verdict
from tasks.report.page_data import ReportData
from tasks.report.table import notes
from tasks.results.models import UNKNOWN, Compared
from tasks.results.run import Cell, Run
from tasks.text.loading import model_name


def run_summary(data: ReportData) -> list[str]:
    """Two lines: what ran, and what came out."""
    config = data.config
    tasks, seeds = ", ".join(data.tables[0].cells), ", ".join(map(str, config.all_seeds))
    return [
        f"{len(data.methods)} methods on {tasks}, seed {seeds}: data {config.data}, preset "
        f"{config.preset}, base model {config.base.model}.",
        verdict(data).striptags(),
    ]


def data_lines(config: RunConfig) -> list[str]:
    """What must be known of the data before anything is read."""
    if config.data != "synthetic" or config.base.model == "tiny":
        return []
    return [
        f"data=synthetic: the users are generated, of words that mean nothing to the model "
        f"{model_name(config.base.model)}; give data=FOLDER or data=lamp"
    ]


def run_notes(run: Run) -> list[str]:
    """What must be known of a run's numbers: its data, its LoRAs, how far its seeds lie apart."""
    lines = data_lines(RunConfig.model_validate(run.config))
    lines += [line for cell in run.cells for line in notes(cell)]
    return lines + coverage_notes(run.cells) + seed_lines(run.cells)


def seed_lines(run_cells: Iterable[Cell]) -> list[str]:
    """How far seeds lie apart, which no interval contains: each has trained a model of its own.

    Means over LaMP tasks of each seed in which all of them were scored; nothing for one seed.
    """
    cells: dict[int, dict[str, Compared]] = {}
    for one in run_cells:
        cells.setdefault(one.config.seed, {})[one.config.lamp_task] = one.compared
    every = max((set(own) for own in cells.values()), key=len, default=set())
    cells = {seed: own for seed, own in cells.items() if set(own) == every}
    if len(cells) < 2:
        return []

    def means(metric: str, method: str) -> list[float]:
        """One number per seed; none where a cell has none."""
        found = [
            [one.intervals.get(method, {}).get(metric, UNKNOWN).point for one in own.values()]
            for own in cells.values()
        ]
        known = [[point for point in points if point is not None] for points in found]
        return [fmean(points) for points in known] if known == found else []

    lines = []
    for method, opponent in CLAIMS:
        pairs = zip(means("score", method), means("score", opponent), strict=False)
        if shown := ", ".join(f"{own - other:+.4f}" for own, other in pairs):
            lines.append(f"mean score, {method} - {opponent}: {shown}")
    if shown := ", ".join(f"{share:.3f}" for share in means("share_of_attainable", "mta")):
        lines.append(f"share of the attainable, mta: {shown}")
    seeds = ", ".join(map(str, cells))
    return [f"by seed ({seeds}), which no interval contains: {line}" for line in lines]

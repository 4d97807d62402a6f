"""Means over cells (LaMP tasks, seeds) with their intervals; see tasks/lamp/statistics.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from tasks.errors import InputError
from tasks.lamp.metrics import Floats
from tasks.lamp.statistics import Resampled, Scored, draws_of, multiplicities

# Metrics that all LaMP tasks have.
COMMON_METRICS = ("score", "share_of_attainable")
# LaMP task and sample of users -> the cells of it, by their number.
Families = Mapping[tuple[str, str], Mapping[int, Scored]]


def mean_over(
    cells: Sequence[Resampled], metrics: Sequence[str] | None = COMMON_METRICS
) -> Resampled:
    """Mean of metrics over cells (LaMP tasks, seeds) with equal weights.

    metrics: None for all that the cells share.
    Draw b of the mean is the mean of the cells' draws b. Cells of one task and sample
    (`Scored.sample`) are drawn together, others independently. Methods and metrics that a cell
    lacks are left out; there is no interval where a cell has none.
    Raises InputError when there is no method that all cells have.
    """
    methods = tuple(
        name for name in cells[0].methods if all(name in cell.methods for cell in cells)
    )
    if not methods:
        raise InputError("no method was scored in all LaMP tasks and seeds; there is no mean")
    drawn = min(len(cell.draws["score"]) for cell in cells)
    families = _families(cells)
    groups = sum(len(_all_groups(own)) for own in families.values())
    cells = _together(cells, families)
    rows = [[cell.methods.index(name) for name in methods] for cell in cells]
    points: dict[str, Floats] = {}
    draws: dict[str, Floats] = {}
    for name in cells[0].points if metrics is None else metrics:
        if all(name in cell.points for cell in cells):
            own = list(zip(cells, rows, strict=True))
            points[name] = np.mean([cell.points[name][at] for cell, at in own], axis=0)
            draws[name] = np.mean([cell.draws[name][:drawn, at] for cell, at in own], axis=0)
    return Resampled(methods, groups, sum(cell.queries for cell in cells), points, draws)


def _families(cells: Sequence[Resampled]) -> Families:
    found: dict[tuple[str, str], dict[int, Scored]] = {}
    for number, cell in enumerate(cells):
        assert cell.scored  # a mean is of cells, not of means
        key = cell.scored.task.name, cell.scored.sample
        found.setdefault(key, {})[number] = cell.scored
    return found


def _all_groups(family: Mapping[int, Scored]) -> list[str]:
    return sorted({group for scored in family.values() for group in scored.groups})


def _together(cells: Sequence[Resampled], families: Families) -> list[Resampled]:
    """Redraw the cells of one task and sample that do not hold the same groups.

    Each seed splits a file's users anew, so a group may be scored in one cell and not in the next.
    The groups of all these cells are drawn at once, and each cell takes the counts of its own.
    Drawn independently, the cells would seem to have more users than there are.
    """
    found = list(cells)
    for (task, sample), family in families.items():
        alike = len({scored.groups for scored in family.values()}) == 1
        if alike or not all(len(cells[number].draws["score"]) for number in family):
            continue
        union = {group: column for column, group in enumerate(_all_groups(family))}
        columns = [[union[group] for group in scored.groups] for scored in family.values()]
        first = cells[min(family)]
        about = ["0", task, sample, *union]  # as `bootstrap` of a cell: by its seed 0
        for (number, scored), own in zip(family.items(), columns, strict=True):
            # The same blocks for each cell, drawn again: all at once may be gigabytes.
            blocks = _blocks(about, columns, len(union), len(first.draws["score"]))
            drawn = draws_of(scored, (block[:, own] for block in blocks), [*cells[number].points])
            found[number] = replace(cells[number], draws=drawn)
    return found


def _blocks(
    about: Sequence[str], columns: Sequence[Sequence[int]], groups: int, resamples: int
) -> Iterator[Floats]:
    """How often each draw holds each group; draws that leave a cell empty are replaced.

    columns: per cell, the columns of its groups.
    """
    kept = tries = 0
    while kept < resamples:
        for weights in multiplicities([*about, str(tries)], groups, resamples - kept):
            full = np.all([weights[:, own].sum(axis=1) > 0 for own in columns], axis=0)
            kept += int(full.sum())
            yield weights[full]
        tries += 1

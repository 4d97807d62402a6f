"""95% intervals of the scores, by a paired bootstrap over independent groups of users.

Groups (tasks/lamp/groups.py) are drawn with all their users and queries, and every method is scored
on the same draws; why so, and why percentiles: docs/statistics.md. All metrics are
functions of sums over queries, so a draw is a row of multiplicities times the groups' sums.

With fewer than 2 groups there is no interval (None). A metric that is nan or inf (a rating "nan" or
"inf" is a number to LaMP) is None, as JSON has no such numbers; so is every difference and mean
with it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from tasks.errors import InputError
from tasks.lamp.definitions import LampTask
from tasks.lamp.metrics import Floats, Rules, Texts, example_columns, from_sums

# Not models, but the best answers of a synthetic world, without the user and from the user's items.
# With both there, every method has a share_of_attainable.
NONPERSONAL, BAYES = "nonpersonal", "bayes"
# Metrics that all LaMP tasks have.
COMMON_METRICS = ("score", "share_of_attainable")
RESAMPLES = 2000
PERCENTILES = (2.5, 97.5)
# Multiplicities drawn at once: 8 million numbers are 64 MB, with any number of groups.
DRAWN_AT_ONCE = 8_000_000
# Sums in another order differ in the 16th digit, but two methods that answer alike must differ by 0
# in every draw.
DECIMALS = 12
# "point", "lo" and "hi" of a 95 % interval, and of a difference "holds" (a bool).
Interval = dict[str, float | None]


@dataclass(frozen=True)
class ScoredAnswers:
    """One cell: the answers of M methods to the same queries of one LaMP task.

    methods: M names. groups: G group ids, sorted. counts: queries per group, float64 [G].
    sums: per group, method and column of `metrics.example_columns`, float64 [G, M, k].
    totals: the same over all queries, [M, k].
    sample: names the draw of users. Cells of one task and sample are resampled together
        (`mean_over`), all others independently.
    rules: as in `metrics.example_columns`.
    """

    task: LampTask
    methods: tuple[str, ...]
    groups: tuple[str, ...]
    counts: Floats
    sums: Floats
    totals: Floats
    sample: str
    rules: Rules = "lamp"

    @classmethod
    def of(
        cls,
        task: LampTask,
        golds: Texts,
        groups: Texts,
        predictions: Mapping[str, Texts],
        sample: str,
        rules: Rules = "lamp",
    ) -> Self:
        """From golds and groups by query id, and predictions by method and query id.

        The methods keep their order; no other order matters.
        """
        columns = same_width(
            [example_columns(task, answers, golds, rules) for answers in predictions.values()]
        )
        names = sorted({groups[query_id] for query_id in golds})
        numbers = {name: number for number, name in enumerate(names)}
        rows = [numbers[groups[query_id]] for query_id in sorted(golds)]
        sums = np.zeros((len(names), len(columns), columns[0].shape[1]))
        with np.errstate(over="ignore"):
            np.add.at(sums, rows, np.stack(columns, axis=1))
            totals = np.stack([part.sum(axis=0) for part in columns])
        counts = np.bincount(rows).astype(np.float64)
        return cls(task, tuple(predictions), tuple(names), counts, sums, totals, sample, rules)


def same_width(parts: Sequence[Floats]) -> list[Floats]:
    """Sums [..., k] with columns of zeros at the right, as many in all as the widest has.

    By the published rules a method has a column for each unknown label that it names.
    """
    width = max(part.shape[-1] for part in parts)
    return [np.pad(one, [(0, 0)] * (one.ndim - 1) + [(0, width - one.shape[-1])]) for one in parts]


@dataclass(frozen=True)
class Resampled:
    """Metrics of a cell, or of a mean over cells, and of its B draws.

    points: metric -> [M]. draws: metric -> [B, M], B = 0 where there are fewer than 2 groups.
    groups, queries: how many there are (of a mean: all cells' distinct groups, and all queries).
    scored: of a cell, what was drawn.
    metrics of a cell: those of `metrics.from_sums`; `score` (accuracy, 1 - mae / 4 or rougeL, below
    0 if ratings beyond 1..5 were predicted); and, with the methods NONPERSONAL and BAYES,
    `share_of_attainable`: (score - nonpersonal) / (bayes - nonpersonal), nan without any room.
    """

    methods: tuple[str, ...]
    groups: int
    queries: int
    points: dict[str, Floats]
    draws: dict[str, Floats]
    scored: ScoredAnswers | None = None


def bootstrap(scored: ScoredAnswers, seed: int, resamples: int = RESAMPLES) -> Resampled:
    """Draw the groups again `resamples` times, the same draws for all methods, and score them."""
    queries = int(scored.counts.sum())
    with np.errstate(over="ignore", invalid="ignore"):
        points = _values(scored, scored.totals, queries)
    count = len(scored.groups)
    about = [str(seed), scored.task.name, scored.sample, *scored.groups]
    blocks = multiplicities(about, count, resamples) if count > 1 else ()
    drawn = _draws(scored, blocks, list(points))
    return Resampled(scored.methods, count, queries, points, drawn, scored)


def _draws(
    scored: ScoredAnswers, blocks: Iterable[Floats], metrics: Iterable[str]
) -> dict[str, Floats]:
    """metric -> [B, M] of a cell. blocks: how often each draw holds each group [b, G]."""
    count, methods, width = scored.sums.shape
    draws = {name: [np.empty((0, methods))] for name in metrics}
    with np.errstate(over="ignore", invalid="ignore"):
        for weights in blocks:
            sums = (weights @ scored.sums.reshape(count, -1)).reshape(-1, methods, width)
            drawn = _values(scored, sums, (weights @ scored.counts)[:, None])
            for name, value in drawn.items():
                draws[name].append(value)
    return {name: np.concatenate(parts) for name, parts in draws.items()}


def multiplicities(about: Sequence[str], groups: int, resamples: int) -> Iterator[Floats]:
    """Draw G groups with replacement: how often each is drawn, in blocks [b, G] of float64.

    about: all that the draws depend on: seed, task, sample, groups.
    """
    generator = generator_of(*about)
    block = max(1, DRAWN_AT_ONCE // groups)
    for first in range(0, resamples, block):
        rows = min(block, resamples - first)
        drawn = generator.multinomial(groups, np.full(groups, 1 / groups), size=rows)
        yield drawn.astype(np.float64)


def generator_of(*about: str) -> np.random.Generator:
    """A generator that all of `about` decides."""
    seed = hashlib.sha256("\x1f".join(about).encode()).digest()[:16]
    return np.random.default_rng(int.from_bytes(seed, "big"))


def mean_over(
    cells: Sequence[Resampled], metrics: Iterable[str] | None = COMMON_METRICS
) -> Resampled:
    """Mean of metrics over cells (LaMP tasks, seeds) with equal weights.

    metrics: None for all. Draw b of the mean is the mean of the cells' draws b. Methods and metrics
    that a cell lacks are left out; there is no interval where a cell has none. Raises InputError
    when there is no method that all cells have.
    """
    methods = tuple(
        name for name in cells[0].methods if all(name in cell.methods for cell in cells)
    )
    if not methods:
        raise InputError("no method was scored in all LaMP tasks and seeds; there is no mean")
    scored = [cell.scored for cell in cells if cell.scored]
    assert len(scored) == len(cells)  # a mean is of cells, not of means
    groups, redrawn = 0, list(cells)
    for about in dict.fromkeys((one.task.name, one.sample) for one in scored):
        family = [n for n, one in enumerate(scored) if (one.task.name, one.sample) == about]
        union = sorted({group for n in family for group in scored[n].groups})
        groups += len(union)
        alike = all(len(scored[n].groups) == len(union) for n in family)
        if not alike and all(len(cells[n].draws["score"]) for n in family):
            drawn = _together([cells[n] for n in family], [scored[n] for n in family], union)
            for n, draws in zip(family, drawn, strict=True):
                redrawn[n] = replace(cells[n], draws=draws)
    least = min(len(cell.draws["score"]) for cell in cells)
    rows = [[cell.methods.index(name) for name in methods] for cell in cells]
    points: dict[str, Floats] = {}
    draws_of: dict[str, Floats] = {}
    for name in cells[0].points if metrics is None else metrics:
        if all(name in cell.points for cell in cells):
            pairs = list(zip(redrawn, rows, strict=True))
            points[name] = np.mean([cell.points[name][at] for cell, at in pairs], axis=0)
            draws_of[name] = np.mean([cell.draws[name][:least, at] for cell, at in pairs], axis=0)
    return Resampled(methods, groups, sum(cell.queries for cell in cells), points, draws_of)


def _together(
    cells: Sequence[Resampled], scored: Sequence[ScoredAnswers], union: Sequence[str]
) -> Iterator[dict[str, Floats]]:
    """The draws of cells of one task and sample that do not hold the same groups.

    Each seed splits a file's users anew. The groups of all these cells, `union`, are drawn at once,
    and each cell takes the counts of its own: drawn apart, there would seem to be more users.
    """
    numbers = {group: column for column, group in enumerate(union)}
    columns = [[numbers[group] for group in one.groups] for one in scored]
    about = ["0", scored[0].task.name, scored[0].sample, *union]  # as `bootstrap` with seed 0
    resamples = len(cells[0].draws["score"])
    for one, its_columns, cell in zip(scored, columns, cells, strict=True):
        # The same blocks for each cell, drawn again: all at once may be gigabytes.
        blocks = _blocks(about, columns, len(union), resamples)
        yield _draws(one, (block[:, its_columns] for block in blocks), cell.points)


def _blocks(
    about: Sequence[str], columns: Sequence[Sequence[int]], groups: int, resamples: int
) -> Iterator[Floats]:
    """As `multiplicities`; draws without a group of some cell, by its `columns`, are replaced."""
    kept = tries = 0
    while kept < resamples:
        for weights in multiplicities([*about, str(tries)], groups, resamples - kept):
            full = np.all([weights[:, own].any(axis=1) for own in columns], axis=0)
            kept += int(full.sum())
            yield weights[full]
        tries += 1


def intervals(resampled: Resampled) -> dict[str, dict[str, Interval]]:
    """method -> metric -> {"point", "lo", "hi"}: the metric and its 95% interval, ready for JSON.

    A share of attainable whose divisor is not above 0 in every draw has no interval.
    """
    return {
        method: {
            metric: _interval(values[row], resampled.draws[metric][:, row])
            for metric, values in resampled.points.items()
        }
        for row, method in enumerate(resampled.methods)
    }


def difference(resampled: Resampled, method: str, opponent: str) -> dict[str, Interval]:
    """metric -> {"point", "lo", "hi", "holds"} of `method` minus `opponent`, by pairs.

    holds: the interval excludes 0 (None without an interval).
    """
    row, other = resampled.methods.index(method), resampled.methods.index(opponent)
    by_metric: dict[str, Interval] = {}
    with np.errstate(over="ignore", invalid="ignore"):
        for metric, values in resampled.points.items():
            draws = resampled.draws[metric]
            interval = _interval(
                np.round(values[row] - values[other], DECIMALS),
                np.round(draws[:, row] - draws[:, other], DECIMALS),
            )
            lo, hi = interval["lo"], interval["hi"]
            holds = None if lo is None or hi is None else lo > 0 or hi < 0
            by_metric[metric] = {**interval, "holds": holds}
    return by_metric


def differences(
    resampled: Resampled, opponents: Sequence[str]
) -> dict[str, dict[str, dict[str, Interval]]]:
    """method -> opponent -> `difference`, for all methods against each of `opponents`."""
    return {
        one: {other: difference(resampled, one, other) for other in opponents if other != one}
        for one in resampled.methods
    }


def _values(scored: ScoredAnswers, sums: Floats, count: Floats | int) -> dict[str, Floats]:
    """All metrics [..., M] of sums [..., M, k] over count ([..., 1] or one number) queries."""
    values = from_sums(scored.task, sums, count, scored.rules)
    if "mae" in values:
        values["score"] = 1 - values["mae"] / 4  # the largest error on the scale 1..5
    else:
        values["score"] = values["accuracy" if "accuracy" in values else "rougeL"]
    if NONPERSONAL in scored.methods and BAYES in scored.methods:
        at = scored.methods.index
        low, high = (values["score"][..., [at(name)]] for name in (NONPERSONAL, BAYES))
        room = np.round(high - low, DECIMALS)
        share = (values["score"] - low) / np.where(room > 0, high - low, np.nan)
        values["share_of_attainable"] = share
    return values


def _interval(point: Floats, draws: Floats) -> Interval:
    if not np.isfinite(point):
        return {"point": None, "lo": None, "hi": None}
    if not len(draws) or not np.isfinite(draws).all():
        return {"point": float(point), "lo": None, "hi": None}
    lo, hi = np.percentile(draws, PERCENTILES)
    return {"point": float(point), "lo": float(lo), "hi": float(hi)}

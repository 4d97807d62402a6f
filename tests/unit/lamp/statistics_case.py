"""Cells of small data for the statistics: answers by group, and worlds of ten authors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tasks.lamp.definitions import LampTask, get_task
from tasks.lamp.statistics import Resampled, ScoredAnswers, bootstrap

MOVIES, RATINGS, TITLES = (get_task(name) for name in ("LaMP-2M", "LaMP-3", "LaMP-5"))
ANSWERS: dict[str, list[str]] = {
    "LaMP-2M": [*MOVIES.labels[:3], " comedy ", "Comedy", "none of them", ""],
    "LaMP-3": ["1", "2", " 3", "4.0", "5", "five", "", "7.5"],
    "LaMP-5": ["a model of language", "language models", "Models", "", "of a big model"],
}


def cell(
    task: LampTask,
    by_group: Mapping[str, list[tuple[str, ...]]],
    methods: tuple[str, ...] = ("m",),
    sample: str = "s",
) -> ScoredAnswers:
    """by_group: group -> queries, each the gold and one prediction per method."""
    rows = {f"{group} {n}": q for group, qs in by_group.items() for n, q in enumerate(qs)}
    return ScoredAnswers.of(
        task,
        {query_id: row[0] for query_id, row in rows.items()},
        {query_id: query_id.split()[0] for query_id in rows},
        {name: {i: row[1 + n] for i, row in rows.items()} for n, name in enumerate(methods)},
        sample,
    )


def random_queries(task: LampTask, groups: int, methods: int) -> dict[str, list[tuple[str, ...]]]:
    """1 to 4 queries per group; the answers of the first method are right half of the time."""
    random = np.random.default_rng(5)
    golds = [
        answer for answer in ANSWERS[task.name] if answer in (task.labels or ANSWERS["LaMP-5"])
    ]
    queries: dict[str, list[tuple[str, ...]]] = {}
    for group in range(groups):
        queries[f"g{group}"] = []
        for _ in range(random.integers(1, 5)):
            gold = str(random.choice(golds))
            given = [str(answer) for answer in random.choice(ANSWERS[task.name], methods)]
            given[0] = gold if random.random() < 0.5 else given[0]
            queries[f"g{group}"].append((gold, *given))
    return queries


def hits(values: Mapping[str, list[int]], methods: int = 1) -> dict[str, list[tuple[str, ...]]]:
    """One right or wrong answer per entry, the same of all methods."""
    return {
        group: [("comedy", *["comedy" if hit else "action"] * methods) for hit in row]
        for group, row in values.items()
    }


def world(right: Mapping[str, list[int]], sample: str = "s") -> Resampled:
    """10 authors of 10 queries; per method, of how many each author's queries it is right."""
    queries = {
        f"g{n}": [
            ("comedy", *["comedy" if q < counts[n] else "action" for counts in right.values()])
            for q in range(10)
        ]
        for n in range(10)
    }
    return bootstrap(cell(MOVIES, queries, tuple(right), sample), seed=0)


FLOOR, CEILING, MODEL = [2, 4] * 5, [9] * 10, [5, 7, 3, 8, 6, 6, 7, 5, 4, 9]

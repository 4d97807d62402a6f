"""What methods answered, beyond its score: methods that answer alike. Read from `score` results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tasks.store.artifacts import Store


def answers(summary: dict[str, Any], where: Store) -> dict[str, dict[str, str]]:
    """method -> query id -> answer, of one LaMP task and seed."""
    import polars as pl

    found = {}
    for method, scored in summary["scores"].items():
        file = where.open(scored["ref"]).folder / "predictions.parquet"
        found[method] = dict(pl.read_parquet(file, columns=["query_id", "prediction"]).iter_rows())
    return found


def identical(summaries: Sequence[dict[str, Any]], where: Store) -> list[list[str]]:
    """Groups of methods that gave the same answers to all queries of all these LaMP tasks."""
    cells = [answers(summary, where) for summary in summaries]
    groups: dict[Any, list[str]] = {}
    for method in cells[0]:
        if all(method in cell for cell in cells):
            given = tuple(frozenset(cell[method].items()) for cell in cells)
            groups.setdefault(given, []).append(method)
    return [group for group in groups.values() if len(group) > 1]


def alike(groups: Sequence[Sequence[str]], method: str, other: str) -> bool:
    """Whether both are in one of the groups of `identical`."""
    return any(method in group and other in group for group in groups)

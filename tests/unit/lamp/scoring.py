"""The metrics of some answers, as `compare` has them."""

from __future__ import annotations

from collections.abc import Mapping

from tasks.lamp.definitions import LampTask
from tasks.lamp.metrics import Rules, example_columns, from_sums


def score(
    task: LampTask,
    predictions: Mapping[str, str],
    golds: Mapping[str, str],
    rules: Rules = "lamp",
) -> dict[str, float]:
    """Metrics of `predictions` against `golds`, both query id -> text, in any order."""
    columns = example_columns(task, predictions, golds, rules)
    values = from_sums(task, columns.sum(axis=0), len(columns), rules)
    return {name: float(value) for name, value in values.items()}

"""What methods answered, beyond its score: answers that are no label, methods that answer alike.

Examples of answers are the model's words: for the report, no log.
"""

from __future__ import annotations

from collections.abc import Sequence

from tasks.lamp.metrics import unlabelled
from tasks.record import Record
from tasks.results.run import Cell
from tasks.results.store import store

# Above this share a line under the table says what helps.
MANY = 0.2
EXAMPLES = 3


class NoLabel(Record):
    """A method's answers in a cell that are no label. share: of all its answers, 0..1.

    examples: the first by query id, each with its answer.
    """

    cell: str
    method: str
    share: float
    examples: tuple[tuple[str, str], ...]


def answers(cell: Cell) -> dict[str, dict[str, str]]:
    """method -> query id -> answer."""
    import polars as pl

    columns = ["query_id", "prediction"]
    files = {one.method: store().path(one.predictions) for one in cell.compared.scored}
    return {m: dict(pl.read_parquet(f, columns=columns).iter_rows()) for m, f in files.items()}


def no_labels(cell: Cell) -> dict[str, NoLabel]:
    """Per method its answers that are no label, by the rules that they are scored by.

    Empty for tasks without labels.
    """
    task = cell.users.task
    if not task.labels:
        return {}
    found = {}
    for method, given in answers(cell).items():
        ids = unlabelled(task, given, cell.compared.rules)
        found[method] = NoLabel(
            cell=cell.name,
            method=method,
            share=len(ids) / len(given),
            examples=tuple((one, given[one]) for one in ids[:EXAMPLES]),
        )
    return found


def no_label_lines(cell: Cell) -> list[str]:
    """A line that says what helps, where more than MANY of a method's answers are no label."""
    many = [one for one in no_labels(cell).values() if one.share > MANY]
    listed = ", ".join(f"{one.method} {one.share:.0%}" for one in many)
    if not listed:
        return []
    rating = cell.users.task.kind == "rating"
    wrong = "so taken as 1 or 5, whichever is farther off" if rating else "so wrong"
    helps = "scoring.answer=likelihood chooses among the labels"
    if cell.base.adapter is None:
        helps += ", base.task_adapt.enabled=true teaches them"
    return [f"{cell.name}: answers that are no label, {wrong}: {listed}; {helps}"]


def identical(cells: Sequence[Cell]) -> list[list[str]]:
    """Groups of methods that gave the same answers to all queries of all these cells."""
    # By their hashes: the answers of all cells together may be more than memory takes.
    tables = [{one.method: one.predictions.sha256 for one in c.compared.scored} for c in cells]
    groups: dict[tuple[str, ...], list[str]] = {}
    for method in tables[0]:
        if all(method in table for table in tables):
            groups.setdefault(tuple(table[method] for table in tables), []).append(method)
    return [group for group in groups.values() if len(group) > 1]


def alike(groups: Sequence[Sequence[str]], method: str, other: str) -> bool:
    """Whether both are in one of the groups of `identical`."""
    return any(method in group and other in group for group in groups)

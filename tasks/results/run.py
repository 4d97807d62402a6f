"""A run as it is written down, `.mta/runs/<id>.json`: what was asked, and what stages gave.

Report, MLflow, export and forget read it; all that it points to is in the store.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import Field

from tasks.config.task import TaskConfig
from tasks.methods import MethodName
from tasks.record import Record
from tasks.results.models import (
    Anchors,
    Answers,
    Base,
    Compared,
    Embedded,
    Merged,
    Prepared,
    Scored,
)


class Merging(Record):
    """What methods with one and the same bank share: anchors, bank and recipes.

    chosen: None where the bank is of adapters that were given.
    """

    methods: tuple[MethodName, ...]
    embedded: Embedded
    chosen: Anchors | None
    merged: Merged


def merging_of(mergings: Iterable[Merging], method: MethodName) -> Merging | None:
    """The bank and recipes that a method takes; None for one that merges nothing or has no bank."""
    return next((one for one in mergings if method in one.methods), None)


class Cell(Record):
    """One LaMP task under one seed: what its stages gave, and in lines what is missing.

    answers: per method, batch by batch; all methods have the same batches. curve: the comparison
    when each few-shot user has so many items. coverage: which layers the LoRAs are on, in lines.
    """

    config: TaskConfig
    users: Prepared
    base: Base
    mergings: tuple[Merging, ...]
    answers: dict[MethodName, tuple[Answers, ...]]
    compared: Compared
    curve: dict[int, Compared] = Field({})
    coverage: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.config.name

    def merging(self, method: MethodName) -> Merging | None:
        return merging_of(self.mergings, method)

    def scored(self, method: str) -> Scored | None:
        """A method's scores; None for answers of no model (the optimum)."""
        return next((one for one in self.compared.scored if one.method == method), None)


class Run(Record):
    """A whole run. id: of the flow run. report: the name of its files in `.mta/reports`.

    date: when it ended. config: RunConfig as JSON, so that a run of another version can be read in
    part. overall: the mean over cells. summary: in two lines, for where no page is.
    """

    id: str
    name: str
    date: str
    report: str
    config: dict[str, Any]
    cells: tuple[Cell, ...] = ()
    overall: Compared | None = None
    missing: tuple[str, ...] = ()
    summary: tuple[str, ...] = ()

    def cell(self, lamp_task: str, seed: int) -> Cell | None:
        """The cell of a LaMP task and seed, if the run has it."""
        cells = {(cell.config.lamp_task, cell.config.seed): cell for cell in self.cells}
        return cells.get((lamp_task, seed))

"""A run as it is written down, `.mta/runs/<id>.json`: what was asked, and what stages gave.

Report, MLflow, export and forget read it; all that it points to is in the store.
"""

from typing import Any

from pydantic import Field

from tasks.config.task import TaskConfig
from tasks.methods import MethodName
from tasks.record import Record
from tasks.results import models


class Merging(Record):
    """What methods with one and the same bank share: anchors, bank and recipes.

    chosen: None where the bank is of adapters that were given.
    """

    methods: tuple[MethodName, ...]
    embedded: models.Embedded
    chosen: models.Anchors | None
    merged: models.Merged


class Trial(Record):
    """Settings of MTA, section by section, that were tried on development users (flows/tune.py).

    users, scores: of each rung, how many users there were and the mean score. seconds: of work.
    """

    settings: dict[str, dict[str, Any]]
    users: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    seconds: float = 0.0


class Tuning(Record):
    """All trials, the run's own settings first, and the number of the chosen one.

    users: the development users, all of whom the last rung has.
    """

    trials: tuple[Trial, ...]
    chosen: int
    users: int

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """What is laid over the run's own settings."""
        return self.trials[self.chosen].settings

    def text(self) -> str:
        """What was chosen, and what it cost, in one line."""
        first, best = self.trials[0], self.trials[self.chosen]
        changed = [f"{section}.{field} {value:g}" for section, fields in self.settings.items()
                   for field, value in fields.items()]  # fmt: skip
        what = f"{', '.join(changed)} (score {best.scores[-1]:.3f}, the run's own settings"
        if not changed:
            what = "no settings were better than the run's own (score"
        seconds = sum(one.seconds for one in self.trials)
        return (
            f"tuned on {self.users} development users: {what} {first.scores[-1]:.3f}), by "
            f"{len(self.trials)} trials of {seconds:.0f} s together"
        )


class Cell(Record):
    """One LaMP task under one seed: what its stages gave, and in lines what is missing.

    answers: per method, batch by batch; all methods have the same batches. curve: the comparison
    when each few-shot user has so many items. coverage: which layers the LoRAs are on, in lines.
    tuning: how settings of `config` were chosen, if they were.
    """

    config: TaskConfig
    users: models.Prepared
    base: models.Base
    mergings: tuple[Merging, ...]
    answers: dict[MethodName, tuple[models.Answers, ...]]
    compared: models.Compared
    curve: dict[int, models.Compared] = Field({})
    coverage: tuple[str, ...] = ()
    tuning: Tuning | None = None
    missing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.config.name

    def merging(self, method: MethodName) -> Merging | None:
        """The bank and recipes of a method; None where it merges nothing or has no bank."""
        return next((one for one in self.mergings if method in one.methods), None)

    def scored(self, method: str) -> models.Scored | None:
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
    overall: models.Compared | None = None
    missing: tuple[str, ...] = ()
    summary: tuple[str, ...] = ()

    @property
    def by_place(self) -> dict[tuple[str, int], Cell]:
        """(LaMP task, seed) -> the cell of both."""
        return {(cell.config.lamp_task, cell.config.seed): cell for cell in self.cells}

    def cell(self, lamp_task: str, seed: int) -> Cell | None:
        """The cell of a LaMP task and seed, if the run has it."""
        return self.by_place.get((lamp_task, seed))

"""`dry_run`: what the run would take, from the prepared users; nothing is trained or loaded."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from prefect import State
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed

from tasks.config.run import RunConfig
from tasks.log import log
from tasks.plan.model import plan_model
from tasks.plan.stages import Planner
from tasks.plan.text import TaskPlan, plan_text
from tasks.report.files import write_state
from tasks.results.run import Cell
from tasks.results.stage import StageFailed
from tasks.stand_in import planned_by

OneCell = Callable[[RunConfig, int, str], tuple[Cell | None, list[str]]]


def planned(config: RunConfig, one_cell: OneCell) -> State[None]:
    """The plan of the whole benchmark: in the log, as an artifact, and beside the store.

    one_cell: the flow's own. It prepares the users; for all other stages a planner stands in.
    Raises InputError, in one line, for what would stop the run at its start.
    """
    model = plan_model(config)
    # Nothing is answered, so that the library for it is not needed.
    base = config.base.model_copy(update={"quantisation": "none"})
    plans: list[TaskPlan] = []
    for seed, lamp_task in product(config.all_seeds, config.lamp_tasks):
        planner = Planner(model)
        with planned_by(planner):
            _, missing = one_cell(config.model_copy(update={"base": base}), seed, lamp_task)
        if missing:
            raise StageFailed("; ".join(missing))
        plans += planner.plans
    text = plan_text(config, model, plans)
    path = write_state("last_plan.md", text)
    log(f"dry run: {path}\n{text}")
    create_markdown_artifact(key="plan", markdown=text)
    return Completed(message=f"dry run: the plan is in {path}; nothing was trained")

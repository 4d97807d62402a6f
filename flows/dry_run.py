"""`dry_run`: what the run would take, from the prepared users; nothing is trained or loaded."""

from __future__ import annotations

from itertools import product
from typing import Any

from prefect import State
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed

from tasks.config import RunConfig
from tasks.prepare import prepare
from tasks.report.files import write_state
from tasks.stage import log, result_of, store

PLAN_FILE = "last_plan.md"


def dry_run(config: RunConfig) -> State[Any]:
    """The plan of the whole benchmark: in the log, as an artifact, and beside the store.

    Raises InputError or StageFailed, in one line, for what would stop the run at its start.
    """
    from tasks.plan.model import planned
    from tasks.plan.stages import plan_task
    from tasks.plan.text import plan_text

    model = planned(config)
    where = store()
    curve = [items for items in config.items_curve if items != config.split.few_shot_items]
    plans = []
    for seed, lamp_task in product(config.all_seeds, config.lamp_tasks):
        for items in (None, *curve):
            split = config.split if items is None else config.split.model_copy(
                update={"few_shot_items": items}
            )  # fmt: skip
            own = config.for_task(lamp_task, seed).model_copy(update={"split": split})
            prepared = result_of(prepare, own.model_dump(mode="json"), lamp_task)
            plans.append(plan_task(own, lamp_task, prepared, where, model, items))
    text = plan_text(config, model, plans)
    path = write_state(PLAN_FILE, text)
    log(f"dry run: {path}\n{text}")
    create_markdown_artifact(key="plan", markdown=text)
    return Completed(message=f"dry run: the plan is in {path}; nothing was trained")

"""`dry_run`: what the run would take, from the prepared users; nothing is trained or loaded."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

from humanize import metric
from prefect import State
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed

from tasks.config.run import RunConfig
from tasks.log import log
from tasks.plan.cost import TaskPlan, Work
from tasks.plan.model import PlannedModel, plan_model
from tasks.plan.stages import Planner
from tasks.report.files import write_state
from tasks.results.run import Cell
from tasks.results.stage import StageFailed
from tasks.stand_in import planned_by

COLUMNS = (
    "stage", "method", "users", "items", "steps", "tokens", "FLOPs", "hours", "memory", "disk",
)  # fmt: skip
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
            run = config.model_copy(update={"base": base, "tune": False})
            _, missing = one_cell(run, seed, lamp_task)
        if missing:
            raise StageFailed("; ".join(missing))
        plans += planner.plans
    text = plan_text(config, model, plans)
    path = write_state("last_plan.md", text)
    log(f"dry run: {path}\n{text}")
    create_markdown_artifact(key="plan", markdown=text)
    return Completed(message=f"dry run: the plan is in {path}; nothing was trained")


def plan_text(config: RunConfig, model: PlannedModel, plans: Sequence[TaskPlan]) -> str:
    """One table per LaMP task, the sums of all, and what was assumed: of the model, once."""
    machine = model.machine
    lines = [
        "# What the run would take",
        "",
        f"Model: {config.base.model}, {metric(model.parameters)} parameters, "
        f"{metric(model.weights, 'B')} in {'bfloat16' if model.each == 2 else 'float32'}. "
        f"{'A GPU' if model.gpu else 'A CPU'} of {machine.peak_tflops:g} TFLOP/s at "
        f"{machine.mfu:.0%} of them (assumed), {machine.memory_gb:g} GB and "
        f"{machine.bandwidth_tb:g} TB/s.",
        "Steps and tokens are counted from the data, with answers of full length; FLOPs follow "
        "from these and the model's size, and hours from FLOPs. Memory is of what stays there, "
        "passes need some beside; disk is the store's, and MLflow keeps the anchors' adapters "
        "twice more: one by one, and as registered banks.",
    ]
    for plan in plans:
        people = [f"{count} {role.replace('_', '-')}" for role, count in plan.users.items()]
        anchors = max((row.users for row in plan.rows if row.stage == "meta-LoRAs"), default=0)
        people += [f"{anchors} anchors"] if anchors else []
        lines += ["", f"## {plan.title}", "", f"Users: {', '.join(people)}.", ""]
        lines += _table(plan.rows, plan.rows, plan.notes)
    everything = [row for plan in plans for row in plan.rows]
    names = dict.fromkeys(work.stage for work in everything)
    stages = [_total(name, [work for work in everything if work.stage == name]) for name in names]
    lines += ["", f"## All of {len(plans)}", "", *_table(stages, everything, model.notes)]
    if config.tune:
        lines += ["", "Not counted: the trials of `tune`, each of fewer users than the run."]
    return "\n".join(lines) + "\n"


def hours(seconds: float) -> str:
    """With three digits; what is under a hundredth of an hour is said to be that."""
    return f"{seconds / 3600:.3g}" if seconds >= 36 or not seconds else "< 0.01"


def _total(stage: str, works: Sequence[Work]) -> Work:
    """The sum; users are not added up, as stages are of the same ones."""
    return replace(sum(works, Work(stage)), users=0, items=0)


def _table(rows: Sequence[Work], works: Sequence[Work], notes: Sequence[str]) -> list[str]:
    """The rows, the sum of all work, and notes beneath. A cell of nothing is empty."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for work in (*rows, _total("all of it", works)):
        counts = [f"{n:,}" for n in (work.users, work.items, work.steps, work.tokens)]
        sizes = [metric(n, "B") for n in (work.memory, work.disk)]
        cells = [*counts, metric(work.flops), hours(work.seconds), *sizes]
        cells = ["" if cell in ("0", "0.00", "0.00 B") else cell for cell in cells]
        lines.append((work.stage, work.method, *cells))
    beneath = ["", *(f"* {note}" for note in notes)] if notes else []
    return [f"| {' | '.join(line)} |" for line in lines] + beneath

"""A plan as markdown, for the log, the Prefect UI and a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from humanize import metric

from tasks.config.run import RunConfig
from tasks.plan.model import PlannedModel
from tasks.plan.work import Work

COLUMNS = (
    "stage", "method", "users", "items", "steps", "tokens", "FLOPs", "hours", "memory", "disk",
)  # fmt: skip


@dataclass(frozen=True)
class TaskPlan:
    """What one LaMP task takes: all work in its order, and what was assumed of lengths."""

    title: str
    users: dict[str, int]
    works: list[Work]
    assumed: list[str]

    @property
    def rows(self) -> list[Work]:
        """The work of each stage and method together."""
        rows: dict[tuple[str, str], Work] = {}
        for work in self.works:
            key = (work.stage, work.method)
            rows[key] = rows.get(key, Work(*key)) + work
        return [work for work in rows.values() if work.users]

    def notes(self, model: PlannedModel) -> list[str]:
        """What was assumed, and what does not fit."""
        notes = self.assumed + [f"{one.stage}: {one.note}" for one in self.works if one.note]
        most = max(work.memory for work in self.works)
        if model.gpu and most > model.machine.memory_gb * 1e9:
            notes.append(
                f"{metric(most, 'B')} is more than the machine has (plan.memory_gb): lower "
                "stacking.users_per_job or anchors.per_job, or set base.gradient_checkpointing"
            )
        return list(dict.fromkeys(notes))


def plan_text(config: RunConfig, model: PlannedModel, plans: Sequence[TaskPlan]) -> str:
    """One table per LaMP task, the sums of all, and what was assumed: of the model, once."""
    machine = model.machine
    lines = [
        "# What the run would take",
        "",
        f"Model: {config.base.model}, {metric(model.shape.parameters)} parameters, "
        f"{metric(model.weights, 'B')} in {'bfloat16' if model.each == 2 else 'float32'}. "
        f"{'A GPU' if model.gpu else 'A CPU'} of {machine.peak_tflops:g} TFLOP/s at "
        f"{machine.mfu:.0%} of them (assumed), {machine.memory_gb:g} GB and "
        f"{machine.bandwidth_tb:g} TB/s.",
        "Steps, tokens and FLOPs are counted from the data, with answers of full length; hours are "
        "an estimate. Disk is the store's; MLflow keeps the anchors' adapters once more.",
    ]
    for plan in plans:
        people = [f"{count} {role.replace('_', '-')}" for role, count in plan.users.items()]
        anchors = max((row.users for row in plan.rows if row.stage == "meta-LoRAs"), default=0)
        people += [f"{anchors} anchors"] if anchors else []
        lines += ["", f"## {plan.title}", "", f"Users: {', '.join(people)}.", ""]
        lines += _table(plan.rows, plan.rows, plan.notes(model))
    everything = [row for plan in plans for row in plan.rows]
    names = dict.fromkeys(work.stage for work in everything)
    stages = [_total(name, [work for work in everything if work.stage == name]) for name in names]
    lines += ["", f"## All of {len(plans)}", "", *_table(stages, everything, model.notes)]
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

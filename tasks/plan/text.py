"""A plan as markdown, for the log, the Prefect UI and a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tasks.config import RunConfig
from tasks.plan.model import Planned
from tasks.plan.stages import TaskPlan
from tasks.plan.work import Work

COLUMNS = (
    "stage", "method", "users", "items", "steps", "tokens", "FLOPs", "hours", "memory", "disk",
    "per user",
)  # fmt: skip
UNITS = ("", "k", "M", "G", "T", "P", "E", "Z")


def plan_text(options: RunConfig, planned: Planned, plans: Sequence[TaskPlan]) -> str:
    """One table per LaMP task, the sums of all, and what was assumed: of the model, once."""
    shape, machine = planned.shape, planned.machine
    dtype = "bfloat16" if planned.each == 2 else "float32"
    lines = [
        "# What the run would take",
        "",
        f"Model: {options.base.model}, {short(shape.parameters)} parameters, "
        f"{size(planned.weights)} in {dtype}. "
        f"{'A GPU' if planned.gpu else 'A CPU'} of {machine.peak_tflops:g} TFLOP/s at "
        f"{machine.mfu:.0%} of them (assumed), {machine.memory_gb:g} GB and "
        f"{machine.bandwidth_tb:g} TB/s.",
        "Steps, tokens and FLOPs are counted from the data, with answers of full length; hours are "
        "an estimate. Disk is the store's; MLflow keeps the anchors' adapters once more.",
    ]
    for plan in plans:
        people = ", ".join(
            f"{count} {role.replace('_', '-')}" for role, count in plan.users.items()
        )
        anchors = f", {plan.anchors} anchors" if plan.anchors else ""
        lines += ["", f"## {plan.title}", "", f"Users: {people}{anchors}.", ""]
        lines += _table([*plan.works, _total("all of it", plan.works)])
        lines += _notes(plan.notes)
    everything = [work for plan in plans for work in plan.works]
    lines += ["", f"## All of {len(plans)}", ""]
    lines += _table([*_by_stage(everything), _total("all of it", everything)])
    lines += _notes(planned.notes)
    return "\n".join(lines) + "\n"


def short(number: float) -> str:
    """Three digits and a letter: 1.23 M."""
    for unit in UNITS[:-1]:
        if abs(number) < 999.5:
            return f"{number:.3g} {unit}".rstrip() if unit else f"{number:.3g}"
        number /= 1000
    return f"{number:.3g} {UNITS[-1]}"


def size(number: float) -> str:
    """Bytes: 1.23 MB."""
    text = short(number)
    return f"{text}B" if " " in text else f"{text} B"


def hours(seconds: float) -> str:
    """With three digits; what is under a hundredth of an hour is said to be that."""
    if not seconds:
        return ""
    return f"{seconds / 3600:.3g}" if seconds >= 36 else "< 0.01"


def _notes(notes: Sequence[str]) -> list[str]:
    return ["", *(f"* {note}" for note in notes)] if notes else []


def _by_stage(works: Sequence[Work]) -> list[Work]:
    names = list(dict.fromkeys(work.stage for work in works))
    return [_total(name, [work for work in works if work.stage == name]) for name in names]


def _total(stage: str, works: Sequence[Work]) -> Work:
    return Work(
        stage,
        steps=sum(work.steps for work in works),
        tokens=sum(work.tokens for work in works),
        flops=sum(work.flops for work in works),
        seconds=sum(work.seconds for work in works),
        memory=max((work.memory for work in works), default=0),
        disk=sum(work.disk for work in works),
    )


def _table(works: Sequence[Work]) -> list[str]:
    lines = [_row(COLUMNS), _row("---" for _ in COLUMNS)]
    for work in works:
        cells = [
            work.stage,
            work.method,
            *(f"{n:,}" if n else "" for n in (work.users, work.items, work.steps, work.tokens)),
            short(work.flops) if work.flops else "",
            hours(work.seconds),
            *(size(n) if n else "" for n in (work.memory, work.disk, work.per_user)),
        ]
        lines.append(_row(cells))
    return lines


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"

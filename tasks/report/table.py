"""The comparison of methods as a table."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from tasks.methods import METHODS, MethodName
from tasks.recipes import read_recipes
from tasks.results.models import Compared, Estimate
from tasks.results.run import Cell
from tasks.results.store import store
from tasks.stacking import read_work
from tasks.users import each_user

Row = Mapping[str, Any]
COSTS = (
    "bytes_per_user", "steps_per_user", "tokens_per_user", "seconds_per_user", "passes_per_answer"
)  # fmt: skip


def rows(cells: Iterable[Cell]) -> list[Row]:
    """One row per cell and method: metrics with their intervals, and cost per user.

    `<metric>_lo` and `_hi` are the 95% interval. `no_label` is the share (0..1) of the answers that
    are no label, in tasks with labels. If the optimum is known, it has rows of its own, without
    costs.
    """
    return [_row(cell, method) for cell in cells for method in cell.compared.intervals]


def _row(cell: Cell, method: str) -> Row:
    compared, scored = cell.compared, cell.scored(method)
    row: dict[str, Any] = {"lamp_task": cell.config.lamp_task}
    if cell.config.several_seeds:
        row["seed"] = cell.config.seed
    row["method"] = method
    # The metric first: MLflow's compare page draws the first it finds.
    metrics = compared.intervals[method]
    row |= _with_intervals({name: one for name, one in metrics.items() if name != "score"})
    if scored:
        row |= {"no_label": scored.no_label} if scored.no_label is not None else {}
        row |= costs(cell, method)
    users = compared.scored[0].users
    return row | {"users": users, "groups": compared.groups, "queries": compared.queries}


def mean_rows(mean: Compared) -> list[Row]:
    """One row per method: the mean over LaMP tasks (and seeds) of what they have in common."""
    name, counts = f"mean of {mean.cells}", {"groups": mean.groups, "queries": mean.queries}
    return [
        {"lamp_task": name, "method": method} | _with_intervals(metrics) | counts
        for method, metrics in mean.intervals.items()
    ]


def _with_intervals(metrics: Mapping[str, Estimate]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in metrics.items():
        row |= {name: value.point, f"{name}_lo": value.lo, f"{name}_hi": value.hi}
    return row


def costs(cell: Cell, method: MethodName) -> dict[str, float]:
    """What a method stores and does per user, means over users.

    bytes_per_user: the recipe (anchor ids and 8 bytes per weight), the user's own LoRA in float32,
    and the text of the history if answers look it up; the bank is shared and not counted. steps
    and tokens: training on the user's items, that of weights, too. seconds_per_user:
    evidence, training and answering, as measured when the work was done. passes_per_answer: how
    often the model reads a question.
    """
    batches = cell.answers[method]
    work = [one for batch in batches for one in read_work(store().path(batch.work))]
    stored, seconds = float(batches[0].bytes_per_user), fmean(one.seconds for one in work)
    steps, tokens = fmean(one.steps for one in work), fmean(one.tokens for one in work)
    passes: float | None = METHODS[method].passes
    if cell.config.method(method).prompt.history_items:
        stored += fmean(
            sum(len(f"{item['text']}{item['answer']}".encode()) for item in user["profile"])
            for user in each_user(cell.users.few_shot)
        )
    if merging := cell.merging(method):
        recipes = read_recipes(merging.merged.recipes).values()
        stored += fmean(len("".join(r.anchors).encode()) + 8 * len(r.weights) for r in recipes)
        seconds += fmean(recipe.seconds for recipe in recipes)
        steps += fmean(recipe.steps for recipe in recipes)
        tokens += fmean(recipe.tokens for recipe in recipes)
        if passes is None:
            passes = fmean(sum(one != 0 for one in recipe.weights) for recipe in recipes)
    return {
        "bytes_per_user": round(stored, 1),
        "steps_per_user": round(steps, 2),
        "tokens_per_user": round(tokens, 1),
        "seconds_per_user": round(seconds, 4),
        "passes_per_answer": round(passes or 0.0, 2),
    }


def table_text(table: Iterable[Row], noted: Iterable[str], missing: Iterable[str]) -> str:
    """The comparison for a terminal, with notes and what is missing.

    A block per LaMP task (and seed), with the columns that it has. An interval stands beside its
    metric.
    """
    blocks: dict[tuple[Any, Any], list[Row]] = {}
    for row in table:
        blocks.setdefault((row["lamp_task"], row.get("seed")), []).append(row)
    lines = [line for block in blocks.values() for line in [*_block(block), ""]]
    lines += [f"note: {item}" for item in noted]
    lines += [f"MISSING: {item}" for item in missing]
    return "\n".join(lines).rstrip() + "\n"


def _block(table: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(name for row in table for name in row)
    columns = [name for name in names if not name.endswith(("_lo", "_hi"))]
    lines = [columns, *([_cell(name, row) for name in columns] for row in table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    sides = ["<" if name in ("lamp_task", "method") else ">" for name in columns]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [form.format(*line).rstrip() for line in lines]


def _cell(column: str, row: Row) -> str:
    value = row.get(column)
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if column in COSTS[:3]:
        return f"{value:,.0f}"
    if column == "passes_per_answer":
        return f"{value:g}"
    lo, hi = row.get(f"{column}_lo"), row.get(f"{column}_hi")
    interval = "" if lo is None or hi is None else f" [{lo:.3f}, {hi:.3f}]"
    return f"{value:.4f}{interval}"

"""The comparison of methods as a table, and what its reader must know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from tasks.fusion import read_recipes
from tasks.lamp.metrics import remarks
from tasks.methods import MethodName
from tasks.prepare import each_user
from tasks.report.answers import no_label_lines, no_labels
from tasks.results.models import Compared, Estimate
from tasks.results.run import Cell
from tasks.stacking import read_work

TEXTS = ("lamp_task", "method")
# Beside any share of the attainable that is below 0.
BELOW_ZERO = (
    "A share of the attainable below 0 is worse than the best answers that ignore who asks "
    "(nonpersonal); far below 0, the model has not learned the task"
)
# By the count of users that it is about, where that is known and not 0.
COUNT_NOTES = {
    "shared_author": "{shared_author} base users or anchor candidates are of one author with a "
    "user of another side (split.kind published divides users, not authors)",
    "papers_asked_by_their_author": "no paper names a citation; {papers_asked_by_their_author} "
    "papers were asked against another author's paper instead",
    "papers_asked_by_a_drawn_citation": "{papers_asked_by_a_drawn_citation} papers name several "
    "citations; the seed drew one of each",
}
FEW_AUTHORS = "the {few_shot_users} few-shot users are {few_shot_groups} authors"
SEEN_QUERIES = (
    "the texts of {queries_in_other_profiles} of {queries} queries stand in the profile of a base "
    "user or anchor candidate too"
)


def rows(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """One row per cell and method: metrics with their intervals, and cost per user.

    `<metric>_lo` and `_hi` are the 95% interval; `no_label` is the share (0..1) of the answers that
    are no label, of tasks that have any. Where the optimum is known it has rows of its own, without
    costs.
    """
    return [row for cell in cells for row in _cell_rows(cell)]


def _cell_rows(cell: Cell) -> list[dict[str, Any]]:
    compared, unlabelled = cell.compared, no_labels(cell)
    return [
        {
            "lamp_task": cell.config.lamp_task,
            **({"seed": cell.config.seed} if cell.config.several_seeds else {}),
            "method": method,
            # The metric first: MLflow's compare page draws the first it finds.
            **_with_intervals(metrics, skip="score"),
            **({"no_label": unlabelled[method].share} if method in unlabelled else {}),
            **(costs(cell, method) if cell.scored(method) else {}),
            "users": compared.scored[0].users,
            "groups": compared.groups,
            "queries": compared.queries,
        }
        for method, metrics in compared.intervals.items()
    ]


def mean_rows(mean: Compared) -> list[dict[str, Any]]:
    """One row per method: the mean over LaMP tasks (and seeds) of what they have in common."""
    return [
        {
            "lamp_task": f"mean of {mean.cells}",
            "method": method,
            **_with_intervals(metrics),
            "groups": mean.groups,
            "queries": mean.queries,
        }
        for method, metrics in mean.intervals.items()
    ]


def _with_intervals(metrics: Mapping[str, Estimate], skip: str = "") -> dict[str, float | None]:
    row: dict[str, float | None] = {}
    for name, value in metrics.items():
        if name != skip:
            row |= {name: value.point, f"{name}_lo": value.lo, f"{name}_hi": value.hi}
    return row


def costs(cell: Cell, method: MethodName) -> dict[str, float]:
    """What a method stores and does per user, means over users.

    bytes_per_user: the recipe (anchor ids and 8 bytes per weight), the user's own LoRA in float32,
    and the text of the history where it is looked up to answer; the bank is shared and not
    counted. steps and tokens: training on the user's items. seconds_per_user: evidence, training
    and answering, as measured when the work was done.
    """
    batches = cell.answers[method]
    work = [one for batch in batches for one in read_work(batch.work)]
    stored, seconds = float(batches[0].bytes_per_user), fmean(one.seconds for one in work)
    if cell.config.method(method).prompt.history_items:
        stored += fmean(
            sum(len(f"{item['text']}{item['answer']}".encode()) for item in user["profile"])
            for user in each_user(cell.users.few_shot)
        )
    if merging := cell.merging(method):
        recipes = read_recipes(merging.merged.recipes).values()
        stored += fmean(len("".join(r.anchors).encode()) + 8 * len(r.weights) for r in recipes)
        seconds += fmean(recipe.seconds for recipe in recipes)
    return {
        "bytes_per_user": round(stored, 1),
        "steps_per_user": round(fmean(one.steps for one in work), 2),
        "tokens_per_user": round(fmean(one.tokens for one in work), 1),
        "seconds_per_user": round(seconds, 4),
    }


def share_lines(table: list[dict[str, Any]]) -> list[str]:
    """What a share of the attainable below 0 means, where a method has one. table: `rows`."""
    shares = [row.get("share_of_attainable") for row in table]
    return [BELOW_ZERO] if any(share is not None and share < 0 for share in shares) else []


def notes(cell: Cell) -> list[str]:
    """What a reader of the numbers must know: what was left out, how few, what is no answer."""
    name = cell.config.lamp_task
    lines = [f"{name}: dropped {count} x {what}" for what, count in cell.users.dropped.items()]
    for merging in cell.mergings:
        alone, asked = merging.chosen.single_users, merging.chosen.asked
        if 0 < alone < asked:
            lines.append(f"{name}, {merging.methods[0]}: {alone} users as anchors of {asked} asked")
    lines += no_label_lines(cell)
    # All methods are scored by the same rules, against the same golds.
    said = remarks(cell.compared.rules, cell.compared.golds_without_token)
    lines += [f"{name}: {line}" for line in said]
    counts = cell.users.counts
    few = counts["few_shot_groups"] < counts["few_shot_users"]
    said = [text for count, text in COUNT_NOTES.items() if counts.get(count)]
    said += [FEW_AUTHORS] if few else []
    said += [SEEN_QUERIES] if counts["queries_in_other_profiles"] else []
    return lines + [f"{name}: {text.format_map(counts)}" for text in said]


def table_text(table: list[dict[str, Any]], noted: list[str], missing: list[str]) -> str:
    """The comparison for a terminal, what is to be noted, and what is missing from it.

    A block per LaMP task (and seed), with the columns that it has; an interval stands beside its
    metric.
    """
    blocks: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
    for row in table:
        blocks.setdefault((row["lamp_task"], row.get("seed")), []).append(row)
    lines = [line for block in blocks.values() for line in [*_block(block), ""]]
    lines += [f"note: {item}" for item in noted]
    lines += [f"MISSING: {item}" for item in missing]
    return "\n".join(lines).rstrip() + "\n"


def _block(table: list[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for row in table for name in row)
    columns = [name for name in names if not name.endswith(("_lo", "_hi"))]
    lines = [columns, *([_cell(name, row) for name in columns] for row in table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    sides = ["<" if name in TEXTS else ">" for name in columns]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [form.format(*line).rstrip() for line in lines]


def _cell(column: str, row: dict[str, Any]) -> str:
    value = row.get(column)
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if column in ("bytes_per_user", "steps_per_user", "tokens_per_user"):
        return f"{value:,.0f}"
    lo, hi = row.get(f"{column}_lo"), row.get(f"{column}_hi")
    interval = "" if lo is None or hi is None else f" [{lo:.3f}, {hi:.3f}]"
    return f"{value:.4f}{interval}"

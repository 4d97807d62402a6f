"""What methods answered, beyond its score: answers that are no label, methods that answer alike.

Read from the `score` results. Examples of answers are the model's words: for the report, no log.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from tasks.errors import label, printable
from tasks.lamp.definitions import get_task
from tasks.lamp.metrics import unlabelled
from tasks.report.page import folded, row, section, table, tag
from tasks.store.artifacts import Store
from tasks.store.pieces import digest
from tasks.tracking.values import scope

# Above this share a line under the table says what helps.
MANY = 0.2
EXAMPLES = 3
SHOWN_LETTERS = 80


def answers(summary: dict[str, Any], where: Store) -> dict[str, dict[str, str]]:
    """method -> query id -> answer, of one LaMP task and seed."""
    import polars as pl

    found = {}
    for method, scored in summary["scores"].items():
        file = where.open(scored["ref"]).folder / "predictions.parquet"
        found[method] = dict(pl.read_parquet(file, columns=["query_id", "prediction"]).iter_rows())
    return found


def no_labels(summary: dict[str, Any], where: Store) -> dict[str, dict[str, Any]]:
    """method -> `share` (0..1) of its answers that are no label, and `examples` of them.

    By the rules that they are scored by. Examples are [query id, answer], the first by id. Empty
    for tasks without labels.
    """
    task = get_task(summary["lamp_task"])
    found: dict[str, dict[str, Any]] = {}
    if not task.labels:
        return found
    for method, given in answers(summary, where).items():
        ids = unlabelled(task, given, summary["scores"][method]["value"]["rules"])
        found[method] = {
            "share": len(ids) / len(given),
            "examples": [[one, given[one]] for one in ids[:EXAMPLES]],
        }
    return found


def no_label_lines(summary: dict[str, Any], where: Store) -> list[str]:
    """A line that says what helps, where more than MANY of a method's answers are no label."""
    shares = {method: one["share"] for method, one in no_labels(summary, where).items()}
    listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share > MANY)
    if not listed:
        return []
    wrong = "so wrong"
    if get_task(summary["lamp_task"]).kind == "rating":
        wrong = "so taken as 1 or 5, whichever is farther off"
    helps = "scoring.answer=likelihood chooses among the labels"
    if "adapter" not in summary["base"]:
        helps += ", base.task_adapt.enabled=true teaches them"
    return [f"{scope(summary)}: answers that are no label, {wrong}: {listed}; {helps}"]


def identical(summaries: Sequence[dict[str, Any]], where: Store) -> list[list[str]]:
    """Groups of methods that gave the same answers to all queries of all these LaMP tasks."""
    # By their digests: the answers of all cells together may be more than memory takes.
    cells = [
        {method: digest(given) for method, given in answers(summary, where).items()}
        for summary in summaries
    ]
    groups: dict[tuple[str, ...], list[str]] = {}
    for method in cells[0]:
        if all(method in cell for cell in cells):
            groups.setdefault(tuple(cell[method] for cell in cells), []).append(method)
    return [group for group in groups.values() if len(group) > 1]


def alike(groups: Sequence[Sequence[str]], method: str, other: str) -> bool:
    """Whether both are in one of the groups of `identical`."""
    return any(method in group and other in group for group in groups)


def no_label_section(found: Sequence[dict[str, Any]]) -> str:
    """A section of the page. found: what `no_labels` says, per LaMP task, seed and method."""
    several = len({one["seed"] for one in found}) > 1
    head = [f'<th class="text">{name}</th>' for name in ("LaMP task", "method")]
    head += ["<th>no label</th>", '<th class="text">the first of them: query, answer</th>']
    lines = []
    for one in found:
        if one["share"]:
            named = one["lamp_task"] + (f", seed {one['seed']}" if several else "")
            shown = "".join(
                f"<li>{escape(label(query))}: {_shown(answer)}</li>"
                for query, answer in one["examples"]
            )
            lines.append(
                row(
                    [
                        tag("th", escape(named), scope="row"),
                        tag("td", escape(one["method"]), class_="text"),
                        tag("td", f"{one['share']:.0%}"),
                        tag("td", f'<ul class="notes">{shown}</ul>', class_="text"),
                    ]
                )
            )
    if not lines:
        return ""
    return section(
        "Answers that are no label",
        "<p>Of the classification and rating tasks. An answer that is none of the labels is wrong; "
        "one that is no rating counts as 1 or 5, whichever is farther off.</p>",
        folded("Shares and examples, by LaMP task and method", table(head, lines)),
    )


def _shown(answer: str) -> str:
    text = printable(answer.strip())
    short = text if len(text) <= SHOWN_LETTERS else f"{text[: SHOWN_LETTERS - 4]} ..."
    return f"<q>{escape(short)}</q>" if short else "<em>empty</em>"

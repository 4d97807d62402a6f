"""Stage 9: the comparison of methods, and the picture of the users."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.anchors import single_users
from tasks.fusion import read_recipes
from tasks.lamp.metrics import remarks
from tasks.methods import METHODS, MethodName
from tasks.prepare import each_user
from tasks.report.answers import no_label_lines, no_labels
from tasks.stage import stage, store
from tasks.store.artifacts import Store
from tasks.store.pieces import Piece, digest, library_versions

VERSION = 2
TEXTS = ("lamp_task", "method")
# Beside any share of the attainable that is below 0.
BELOW_ZERO = (
    "A share of the attainable below 0 is worse than the best answers that ignore who asks "
    "(nonpersonal); far below 0, the model has not learned the task"
)


def rows(summaries: list[dict[str, Any]], where: Store) -> list[dict[str, Any]]:
    """One row per LaMP task and method: metrics with their intervals, and cost per user.

    `<metric>_lo` and `_hi` are the 95% interval; `no_label` is the share (0..1) of the answers that
    are no label, of tasks that have any. Where the optimum is known it has rows of its own, without
    costs.
    """
    table = []
    for summary in summaries:
        compared = summary["compared"]["value"]
        unlabelled = no_labels(summary, where)
        for method, found in compared["intervals"].items():
            scored = summary["scores"].get(method)
            table.append(
                {
                    "lamp_task": summary["lamp_task"],
                    **({"seed": summary["seed"]} if summary["several_seeds"] else {}),
                    "method": method,
                    # The metric first: MLflow's compare page draws the first it finds.
                    **_with_intervals(found, skip="score"),
                    **({"no_label": unlabelled[method]["share"]} if method in unlabelled else {}),
                    **(costs(summary, method, where) if scored else {}),
                    "users": summary["scores"][next(iter(summary["scores"]))]["value"]["users"],
                    "groups": compared["groups"],
                    "queries": compared["queries"],
                }
            )
    return table


def mean_rows(mean: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per method: the mean over LaMP tasks (and seeds) of what they have in common."""
    value = mean["value"]
    return [
        {
            "lamp_task": f"mean of {value['cells']}",
            "method": method,
            **_with_intervals(found),
            "groups": value["groups"],
            "queries": value["queries"],
        }
        for method, found in value["intervals"].items()
    ]


def _with_intervals(
    found: dict[str, dict[str, float | None]], skip: str = ""
) -> dict[str, float | None]:
    row: dict[str, float | None] = {}
    for metric, value in found.items():
        if metric != skip:
            row |= {
                metric: value["point"],
                f"{metric}_lo": value["lo"],
                f"{metric}_hi": value["hi"],
            }
    return row


def costs(summary: dict[str, Any], method: MethodName, where: Store) -> dict[str, float]:
    """What a method stores and does per user, means over users.

    bytes_per_user: the recipe (anchor ids and 8 bytes per weight), the user's own LoRA in float32,
    and the text of the history where it is looked up to answer; the bank is shared and not
    counted. steps and tokens: training on the user's items. seconds_per_user: evidence, training
    and answering, as measured when the work was done.
    """
    kind = METHODS[method]
    seconds = _mean(s for part in summary["answered"][method] for s in part["notes"]["per_user"])
    stored = steps = tokens = 0.0
    if kind.history:
        few_shot = each_user(where, summary["prepared"], "few_shot")
        stored += _mean(
            sum(len(f"{item['text']}{item['answer']}".encode()) for item in user["profile"])
            for user in few_shot
        )
    if kind.merged:
        own = summary["banks"][summary["bank_of"][method]]
        stored += _mean(
            len("".join(r["anchors"]).encode()) + 8 * len(r["weights"])
            for r in read_recipes(where, own["fusion"]).values()
        )
        if own["evidence"]:
            seconds += _mean(own["evidence"]["notes"]["per_user"])
    if kind.trained:
        shards = summary["stacking"][method]
        work = [item for shard in shards for item in shard["value"]["work"]]
        stored += shards[0]["value"]["bytes_per_user"]
        steps = _mean(item["steps"] for item in work)
        tokens = _mean(item["tokens"] for item in work)
        seconds += _mean(s for shard in shards for s in shard["notes"]["per_user"])
    return {
        "bytes_per_user": round(stored, 1),
        "steps_per_user": round(steps, 2),
        "tokens_per_user": round(tokens, 1),
        "seconds_per_user": round(seconds, 4),
    }


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def share_lines(table: list[dict[str, Any]]) -> list[str]:
    """What a share of the attainable below 0 means, where a method has one. table: `rows`."""
    shares = [row.get("share_of_attainable") for row in table]
    return [BELOW_ZERO] if any(share is not None and share < 0 for share in shares) else []


def notes(summary: dict[str, Any], where: Store) -> list[str]:
    """What a reader of the numbers must know: what was left out, how few, what is no answer."""
    name, prepared = summary["lamp_task"], summary["prepared"]["value"]
    lines = [f"{name}: dropped {count} x {what}" for what, count in prepared["dropped"].items()]
    for method, own in summary["banks"].items():
        chosen = own["anchors"]["value"]
        if 0 < (alone := single_users(chosen)) < chosen["asked"]:
            lines.append(f"{name}, {method}: {alone} users as anchors of {chosen['asked']} asked")
    lines += no_label_lines(summary, where)
    # All methods are scored by the same rules, against the same golds.
    scored = next(iter(summary["scores"].values()))
    said = remarks(scored["value"]["rules"], scored["notes"]["golds_without_token"])
    lines += [f"{name}: {line}" for line in said]
    counts = prepared["counts"]
    if authors := counts.get("shared_author"):
        lines.append(
            f"{name}: {authors} base users or anchor candidates are of one author with a user of "
            "another side (split.kind published divides users, not authors)"
        )
    if papers := counts.get("papers_asked_by_their_author"):
        lines.append(
            f"{name}: no paper names a citation; {papers} papers were asked against another "
            "author's paper instead"
        )
    if papers := counts.get("papers_asked_by_a_drawn_citation"):
        lines.append(f"{name}: {papers} papers name several citations; the seed drew one of each")
    if counts["few_shot_groups"] < counts["few_shot_users"]:
        lines.append(
            f"{name}: the {counts['few_shot_users']} few-shot users are "
            f"{counts['few_shot_groups']} authors"
        )
    if counts["queries_in_other_profiles"]:
        lines.append(
            f"{name}: the texts of {counts['queries_in_other_profiles']} of {counts['queries']} "
            "queries stand in the profile of a base user or anchor candidate too"
        )
    return lines


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
    columns = [name for name in names if name.removesuffix("_lo").removesuffix("_hi") == name]
    cells = [columns] + [[_cell(name, row) for name in columns] for row in table]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = [
        "  ".join(
            cell.ljust(width) if columns[index] in TEXTS else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


@stage(name="map")
def users_map(lamp_task: str, chosen: dict[str, Any], bank: dict[str, list[str]]) -> Piece:
    """`map.png`: users on two principal components, clusters by colour, anchors marked.

    bank: the members of each anchor that the bank holds.
    """
    where = store()
    key = digest(
        {
            "version": VERSION,
            "libraries": library_versions(("matplotlib", "polars")),
            "lamp_task": lamp_task,
            "anchors": chosen["ref"]["sha256"],
            "bank": bank,
        }
    )

    def make(out: Path) -> dict[str, Any]:
        import polars as pl

        from tasks.report.charts import users_map as draw

        table = pl.read_parquet(where.open(chosen["ref"]).folder / "anchors.parquet")
        value, few_shot = chosen["value"], table.filter(pl.col("role") == "few_shot")
        title = (
            f"{lamp_task}: {value['candidates']} anchor candidates in {value['clusters']} "
            f"clusters,\n{len(bank)} anchors in the bank, {len(few_shot)} few-shot users"
        )
        # No creation time or version in the file: the same users give the same bytes.
        draw(table, bank, title).savefig(
            out / "map.png", bbox_inches="tight", metadata={"Software": None}
        )
        return {}

    return where.get("map", key, make)


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

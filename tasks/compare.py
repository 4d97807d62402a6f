"""Stage 9: scores of every method, and methods against each other, with intervals.

One result per LaMP task and seed (a cell), with the bootstrap's draws; then the mean over cells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config.task import TaskConfig
from tasks.lamp.definitions import LampTask
from tasks.methods import METHODS
from tasks.record import Record
from tasks.results.models import Answers, Compared, Prepared, Scored
from tasks.results.stage import stage
from tasks.results.store import store

if TYPE_CHECKING:
    import polars as pl

    from tasks.lamp.metrics import Rules
    from tasks.lamp.statistics import Resampled
    from tasks.lamp.statistics import Scored as ScoredAnswers

DRAWS_FILE = "draws.safetensors"
LIBRARIES = ("numpy", "polars", "rouge-score")


class Answered(Record):
    """The answers of one method, batch by batch."""

    method: str
    batches: tuple[Answers, ...]


def compared(config: TaskConfig, users: Prepared, answered: dict[str, list[Answers]]) -> Compared:
    """The comparison of a cell's methods, by the rules that the configuration asks for."""
    from tasks.lamp.metrics import rules_of

    rules = rules_of(config.task, config.scoring.metrics, config.scoring.tokens)
    # A world of another seed has other users; a file's are the same, wherever it lies.
    sample = f"synthetic {config.seed}" if config.data == "synthetic" else "given"
    methods = tuple(
        Answered(method=name, batches=tuple(batches)) for name, batches in answered.items()
    )
    return compare(users, methods, rules, sample)


@stage(version=6, libraries=LIBRARIES)
def compare(users: Prepared, answered: tuple[Answered, ...], rules: Rules, sample: str) -> Compared:
    """Scores of each method, their intervals, and its difference to each other one.

    rules: those that answers are scored by (tasks/lamp/metrics.py). sample: cells of one sample
    share users. In worlds whose optimum is known the answers of `nonpersonal`, `bayes` and
    `oracle` are methods, too.
    """
    from tasks.lamp.metrics import from_sums, golds_without_token, unlabelled
    from tasks.lamp.statistics import bootstrap

    tables = {one.method: _predictions(one) for one in answered}
    predictions = {method: _by_query(table, "prediction") for method, table in tables.items()}
    first = next(iter(tables.values()))
    scored = _scored_answers(users, first, predictions, rules, sample)
    resampled = bootstrap(scored, 0)
    with store().new("compare") as folder:
        _write(folder.path, scored, resampled)
        for method, table in tables.items():
            _write_answers(folder.path / method, users.task, table, predictions[method])
    no_label = {
        method: len(unlabelled(users.task, given, rules)) / len(given)
        for method, given in predictions.items()
        if users.task.labels
    }
    # The optimum's rows of `scored` come after the methods'.
    scores = tuple(
        Scored(
            method=method,
            metrics={
                name: float(value)
                for name, value in from_sums(users.task, sums, len(table), rules).items()
            },
            users=table["user_id"].n_unique(),
            queries=len(table),
            predictions=folder.file(f"{method}/predictions.parquet"),
            golds=folder.file(f"{method}/golds.json"),
            no_label=no_label.get(method),
        )
        for (method, table), sums in zip(tables.items(), scored.totals, strict=False)
    )
    return Compared(
        task=users.task,
        rules=rules,
        sample=sample,
        scored=scores,
        draws=folder.file(DRAWS_FILE),
        golds_without_token=golds_without_token(users.task, first["gold"], rules),
        **_values(resampled),
    )


@stage(version=5, libraries=LIBRARIES)
def overall(cells: tuple[Compared, ...]) -> Compared:
    """The mean over cells: `score` and the share of the attainable."""
    from tasks.lamp.means import COMMON_METRICS

    return mean_of(cells, COMMON_METRICS)


def mean_of(cells: Sequence[Compared], metrics: Sequence[str] | None = None) -> Compared:
    """The mean over cells of these metrics, or of all that the cells share."""
    from tasks.lamp.means import mean_over

    mean = mean_over([read_draws(cell) for cell in cells], metrics=metrics)
    return Compared(cells=len(cells), **_values(mean))


def read_draws(cell: Compared) -> Resampled:
    """A cell's points and draws as they were computed, and what they were computed from."""
    from safetensors.numpy import load_file

    from tasks.lamp.statistics import Resampled, Scored

    assert cell.draws is not None
    assert cell.task is not None
    tensors = load_file(store().path(cell.draws))
    names = [name.removeprefix("points.") for name in tensors if name.startswith("points.")]
    scored = Scored(
        cell.task,
        cell.methods,
        tuple(map(str, tensors["groups"].tolist())),
        tensors["counts"],
        tensors["sums"],
        tensors["totals"],
        cell.sample,
        cell.rules,
    )
    return Resampled(
        cell.methods,
        cell.groups,
        cell.queries,
        {name: tensors[f"points.{name}"] for name in sorted(names)},
        {name: tensors[f"draws.{name}"] for name in sorted(names)},
        scored,
    )


def _predictions(answered: Answered) -> pl.DataFrame:
    """user_id, query_id, gold, prediction of all batches."""
    import polars as pl

    files = [store().path(batch.predictions) for batch in answered.batches]
    return pl.concat(pl.read_parquet(file) for file in files).select(
        "user_id", "query_id", "gold", "prediction"
    )


def _by_query(table: pl.DataFrame, column: str) -> dict[str, str]:
    """query id -> value of the column."""
    return dict(table.select("query_id", column).iter_rows())


def _write_answers(
    folder: Path, task: LampTask, table: pl.DataFrame, predictions: dict[str, str]
) -> None:
    """The predictions as a table, and in the format that LaMP takes submissions in."""
    from tasks.lamp.metrics import golds_json

    folder.mkdir()
    table.write_parquet(folder / "predictions.parquet")
    text = json.dumps(golds_json(task, predictions), indent=1, ensure_ascii=False)
    (folder / "golds.json").write_text(text + "\n")


def _scored_answers(
    users: Prepared,
    table: pl.DataFrame,
    predictions: dict[str, dict[str, str]],
    rules: Rules,
    sample: str,
) -> ScoredAnswers:
    """All methods' predictions, scored; and the optimum's where it is known. table: of any."""
    import polars as pl

    from tasks.lamp.statistics import Scored

    golds, user_of = _by_query(table, "gold"), _by_query(table, "user_id")
    few_shot = pl.read_parquet(store().path(users.few_shot), columns=["user_id", "group"])
    group = dict(few_shot.iter_rows())
    if users.optimum:
        optimum = pl.read_parquet(store().path(users.optimum))
        asked = optimum.filter(pl.col("query_id").is_in(list(golds)))
        known = {name: _by_query(asked, name) for name in ("nonpersonal", "bayes", "oracle")}
        predictions = predictions | known
    return Scored.of(
        users.task,
        golds,
        {query: group[user] for query, user in user_of.items()},
        predictions,
        sample=sample,
        rules=rules,
    )


def _write(out: Path, scored: ScoredAnswers, resampled: Resampled) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    # Cells of other seeds have some of the groups, too; to see which it takes no names.
    digests = [hashlib.sha256(group.encode()).digest()[:8] for group in scored.groups]
    tensors = {
        "groups": np.frombuffer(b"".join(digests), dtype=np.int64),
        "counts": scored.counts,
        "sums": scored.sums,
        "totals": scored.totals,
    }
    for name, values in resampled.points.items():
        tensors |= {f"points.{name}": values, f"draws.{name}": resampled.draws[name]}
    save_file({name: np.ascontiguousarray(one) for name, one in tensors.items()}, out / DRAWS_FILE)


def _values(resampled: Resampled) -> dict[str, Any]:
    """What a cell and a mean over cells say alike."""
    from tasks.lamp import statistics

    opponents = [name for name in METHODS if name in resampled.methods]
    return {
        "groups": resampled.groups,
        "queries": resampled.queries,
        "methods": list(resampled.methods),
        "intervals": statistics.intervals(resampled),
        "differences": statistics.differences(resampled, opponents),
    }

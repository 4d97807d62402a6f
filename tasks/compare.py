"""Stage 9: scores of every method, and methods against each other, with intervals.

One result per LaMP task and seed (a cell), with the bootstrap's draws; then the mean over cells.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from safetensors.numpy import load_file, save_file

from tasks.config.task import TaskConfig
from tasks.lamp import statistics
from tasks.lamp.metrics import Rules, golds_json, golds_without_token, rules_of, unlabelled
from tasks.lamp.statistics import COMMON_METRICS, Resampled, bootstrap, mean_over
from tasks.lamp.synthetic.optimum import PREDICTORS
from tasks.methods import METHODS, MethodName
from tasks.results.models import Answers, Compared, Prepared, Scored
from tasks.results.stage import stage
from tasks.results.store import store

DRAWS_FILE = "draws.safetensors"
LIBRARIES = ("numpy", "polars", "rouge-score")
# The answers of each method, batch by batch.
Batches = dict[MethodName, tuple[Answers, ...]]


def compared(config: TaskConfig, users: Prepared, answered: Batches) -> Compared:
    """The comparison of a cell's methods, by the rules that the configuration asks for."""
    rules = rules_of(config.task, config.scoring.metrics, config.scoring.tokens)
    # Worlds of two seeds have other users. Users read from files count as the same.
    sample = f"synthetic {config.seed}" if config.data == "synthetic" else "given"
    return compare(users, answered, rules, sample)


@stage(version=7, libraries=LIBRARIES)
def compare(users: Prepared, answered: Batches, rules: Rules, sample: str) -> Compared:
    """Scores of each method, their intervals, and its difference to each other one.

    rules: what answers are scored by (tasks/lamp/metrics.py). sample: cells of one sample share
    users. In worlds whose optimum is known, its PREDICTORS are scored like methods.
    """
    task = users.task
    tables = {name: _table(answered[name]) for name in METHODS if name in answered}
    predictions = {method: _by_query(table, "prediction") for method, table in tables.items()}
    first = next(iter(tables.values()))
    golds, user_of = _by_query(first, "gold"), _by_query(first, "user_id")
    few_shot = pl.read_parquet(store().path(users.few_shot), columns=["user_id", "group"])
    group_of = dict(few_shot.iter_rows())
    optimum = {}
    if users.optimum:
        best = pl.read_parquet(store().path(users.optimum))
        asked = best.filter(pl.col("query_id").is_in(list(golds)))
        optimum = {name: _by_query(asked, name) for name in PREDICTORS}
    groups = {query: group_of[user] for query, user in user_of.items()}
    scored = statistics.ScoredAnswers.of(
        task, golds, groups, predictions | optimum, sample=sample, rules=rules
    )
    resampled = bootstrap(scored, 0)
    with store().new("compare") as folder:
        _write_draws(folder.path / DRAWS_FILE, resampled)
        for method, table in tables.items():
            of_method = folder.path / method
            of_method.mkdir()
            table.write_parquet(of_method / "predictions.parquet")
            # The format of LaMP's submissions.
            submission = golds_json(task, predictions[method])
            text = json.dumps(submission, indent=1, ensure_ascii=False) + "\n"
            (of_method / "golds.json").write_text(text)
    files = tuple(
        Scored(
            method=method,
            users=table["user_id"].n_unique(),
            queries=len(table),
            predictions=folder.file(f"{method}/predictions.parquet"),
            golds=folder.file(f"{method}/golds.json"),
            no_label=len(unlabelled(task, predictions[method], rules)) / len(table)
            if task.labels
            else None,
        )
        for method, table in tables.items()
    )
    return _compared(
        resampled,
        task=task,
        rules=rules,
        sample=sample,
        scored=files,
        draws=folder.file(DRAWS_FILE),
        golds_without_token=golds_without_token(task, first["gold"], rules),
    )


@stage(version=6, libraries=LIBRARIES)
def overall(cells: tuple[Compared, ...]) -> Compared:
    """The means over cells of `score` and of the share of the attainable."""
    return mean_of(cells, COMMON_METRICS)


def mean_of(cells: Sequence[Compared], metrics: Sequence[str] | None = None) -> Compared:
    """The mean over cells of these metrics, or of all that the cells share."""
    if len(cells) == 1 and metrics is None:
        return cells[0]  # as it was computed
    mean = mean_over([read_draws(cell) for cell in cells], metrics=metrics)
    return _compared(mean, cells=len(cells))


def read_draws(cell: Compared) -> Resampled:
    """A cell's points and bootstrap draws, and the scores that they were computed from."""
    assert cell.draws is not None
    assert cell.task is not None
    tensors = load_file(store().path(cell.draws))
    names = sorted(name.removeprefix("points.") for name in tensors if name.startswith("points."))
    scored = statistics.ScoredAnswers(
        cell.task,
        cell.methods,
        tuple(map(str, tensors["groups"].tolist())),
        tensors["counts"],
        tensors["sums"],
        tensors["totals"],
        cell.sample,
        cell.rules,
    )
    points = {name: tensors[f"points.{name}"] for name in names}
    draws = {name: tensors[f"draws.{name}"] for name in names}
    return Resampled(cell.methods, cell.groups, cell.queries, points, draws, scored)


def _compared(resampled: Resampled, **more: object) -> Compared:
    """What a cell and a mean over cells both have, and `more`."""
    opponents = [name for name in METHODS if name in resampled.methods]
    values = {
        "groups": resampled.groups,
        "queries": resampled.queries,
        "methods": resampled.methods,
        "intervals": statistics.intervals(resampled),
        "differences": statistics.differences(resampled, opponents),
    }
    return Compared.model_validate(values | more)


def _table(batches: tuple[Answers, ...]) -> pl.DataFrame:
    """user_id, query_id, gold, prediction of all batches."""
    files = [store().path(batch.predictions) for batch in batches]
    columns = ["user_id", "query_id", "gold", "prediction"]
    table = pl.concat(pl.read_parquet(file, columns=columns) for file in files)
    return table.explode(columns[1:]).drop_nulls("query_id")


def _by_query(table: pl.DataFrame, column: str) -> dict[str, str]:
    """query id -> value of the column."""
    return dict(table.select("query_id", column).iter_rows())


def _write_draws(file: Path, resampled: Resampled) -> None:
    """What `read_draws` reads."""
    scored = resampled.scored
    assert scored is not None
    # Hashes are enough to see which groups the cells of other seeds share.
    digests = [hashlib.sha256(group.encode()).digest()[:8] for group in scored.groups]
    tensors = {
        "groups": np.frombuffer(b"".join(digests), dtype=np.int64),
        "counts": scored.counts,
        "sums": scored.sums,
        "totals": scored.totals,
    }
    for name, values in resampled.points.items():
        tensors |= {f"points.{name}": values, f"draws.{name}": resampled.draws[name]}
    save_file({name: np.ascontiguousarray(one) for name, one in tensors.items()}, file)

"""Stage 9: methods against each other, with intervals, and against the optimum where it is known.

One piece per LaMP task and seed (a cell), holding the bootstrap's draws; then the mean over cells.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config import RunConfig
from tasks.prepare import OPTIMUM_FILE
from tasks.stage import stage, store
from tasks.store.artifacts import Store
from tasks.store.pieces import Piece, digest, library_versions

if TYPE_CHECKING:
    from tasks.lamp.metrics import Rules
    from tasks.lamp.statistics import Resampled, Scored

VERSION = 3
# What every method is compared with, by pairs; those that were run.
OPPONENTS = ("base", "oppu", "merge_only", "mta")
DRAWS_FILE = "draws.safetensors"


@stage(name="compare", task_run_name="compare-{lamp_task}")
def compare(
    config: dict[str, Any], lamp_task: str, prepared: dict[str, Any], scores: dict[str, Any]
) -> Piece:
    """Intervals of each method's metrics in one cell, and of each difference to an opponent.

    scores: method -> `score` result. The value holds `intervals` and `differences`
    (tasks/lamp/statistics.py); in worlds whose optimum is known the answers of `nonpersonal`,
    `bayes` and `oracle` are methods, too.
    """
    options = RunConfig.model_validate(config)
    where = store()
    key = digest(
        {
            "version": VERSION,
            "libraries": library_versions(("numpy", "polars", "rouge-score")),
            "lamp_task": lamp_task,
            "prepared": prepared["ref"]["sha256"],
            "scores": {method: item["ref"]["sha256"] for method, item in scores.items()},
            "rules": _rules(options, lamp_task),
            "seed": options.seed,
        }
    )

    def make(out: Path) -> dict[str, Any]:
        from tasks.lamp.statistics import bootstrap

        scored = _scored(options, lamp_task, where, prepared, scores)
        resampled = bootstrap(scored, 0)
        _write(out, scored, resampled)
        about = {"lamp_task": lamp_task, "sample": scored.sample, "rules": scored.rules}
        return {**about, **_value(resampled)}

    return where.get("compare", key, make)


@stage(name="overall")
def overall(cells: list[dict[str, Any]]) -> Piece:
    """The mean over cells (`compare` results): `score` and share of the attainable, as above."""
    where = store()
    key = digest({"version": VERSION, "cells": [cell["ref"]["sha256"] for cell in cells]})

    def make(_out: Path) -> dict[str, Any]:
        from tasks.lamp.means import mean_over

        mean = mean_over([read_draws(where, cell) for cell in cells])
        return {"cells": len(cells), **_value(mean)}

    return where.get("overall", key, make)


def read_draws(where: Store, cell: dict[str, Any]) -> Resampled:
    """A cell's points and draws as they were computed, and what they were computed from."""
    from safetensors.numpy import load_file

    from tasks.lamp.definitions import get_task
    from tasks.lamp.statistics import Resampled, Scored

    tensors = load_file(where.open(cell["ref"]).folder / DRAWS_FILE)
    names = [name.removeprefix("points.") for name in tensors if name.startswith("points.")]
    value = cell["value"]
    methods = tuple(value["methods"])
    scored = Scored(
        get_task(value["lamp_task"]),
        methods,
        tuple(map(str, tensors["groups"].tolist())),
        tensors["counts"],
        tensors["sums"],
        tensors["totals"],
        value["sample"],
        value["rules"],
    )
    return Resampled(
        methods,
        value["groups"],
        value["queries"],
        {name: tensors[f"points.{name}"] for name in sorted(names)},
        {name: tensors[f"draws.{name}"] for name in sorted(names)},
        scored,
    )


def _rules(options: RunConfig, lamp_task: str) -> Rules:
    from tasks.lamp.definitions import get_task
    from tasks.lamp.metrics import rules_of

    return rules_of(get_task(lamp_task), options.scoring.metrics, options.scoring.tokens)


def _sample(options: RunConfig) -> str:
    """A world of another seed has other users; a file's are the same, wherever it lies."""
    return f"synthetic {options.seed}" if options.data == "synthetic" else "given"


def _scored(
    options: RunConfig,
    lamp_task: str,
    where: Store,
    prepared: dict[str, Any],
    scores: dict[str, Any],
) -> Scored:
    import polars as pl

    from tasks.lamp.definitions import get_task
    from tasks.lamp.statistics import Scored

    predictions: dict[str, dict[str, str]] = {}
    golds: dict[str, str] = {}
    users: dict[str, str] = {}
    for method, one in scores.items():
        table = pl.read_parquet(where.open(one["ref"]).folder / "predictions.parquet")
        ids = table["query_id"].to_list()
        predictions[method] = dict(zip(ids, table["prediction"].to_list(), strict=True))
        golds = dict(zip(ids, table["gold"].to_list(), strict=True))
        users = dict(zip(ids, table["user_id"].to_list(), strict=True))
    folder = where.open(prepared["ref"]).folder
    few_shot = pl.read_parquet(folder / "few_shot.parquet", columns=["user_id", "group"])
    group = dict(few_shot.iter_rows())
    if (folder / OPTIMUM_FILE).is_file():
        optimum = pl.read_parquet(folder / OPTIMUM_FILE)
        asked = optimum.filter(pl.col("query_id").is_in(list(golds)))
        for name in ("nonpersonal", "bayes", "oracle"):
            predictions[name] = dict(asked.select("query_id", name).iter_rows())
    return Scored.of(
        get_task(lamp_task),
        golds,
        {query: group[user] for query, user in users.items()},
        predictions,
        sample=_sample(options),
        rules=_rules(options, lamp_task),
    )


def _write(out: Path, scored: Scored, resampled: Resampled) -> None:
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


def _value(resampled: Resampled) -> dict[str, Any]:
    """What a cell and a mean over cells say alike."""
    from tasks.lamp import statistics

    opponents = [name for name in OPPONENTS if name in resampled.methods]
    return {
        "groups": resampled.groups,
        "queries": resampled.queries,
        "methods": list(resampled.methods),
        "intervals": statistics.intervals(resampled),
        "differences": statistics.differences(resampled, opponents),
    }

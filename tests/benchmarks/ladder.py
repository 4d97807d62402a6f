"""Where MTA loses what could be had: parts of it replaced by the truth of generated worlds.

    python -m tests.benchmarks.ladder                     worlds 100 to 103, all tasks and rungs
    python -m tests.benchmarks.ladder --seeds 101 --tasks LaMP-1 --rungs today clusters

Each rung replaces a part of the rung that it is held against by what is true of the world, or by
more of it (RUNGS); the first is the embedded preset. What is known of a world, who mixes which
archetypes, a run never sees. All rungs are without `fusion.vectors`, as true clusters need no
embedding. `--to` gets the table as JSON and a picture; what was made is kept in the store
(MTA_STORE), so a run that was ended goes on.

The score is the share of the attainable, (score - nonpersonal) / (bayes - nonpersonal), of `base`,
`merge_only`, `mta`, and `mixture_of_answers` (the bank's answers mixed by the same weights, instead
of its LoRAs); the mean of the worlds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from tests.benchmarks.archetypes import dealt, weights

if TYPE_CHECKING:
    from tasks.config.task import MethodConfig, TaskConfig
    from tasks.methods import MethodName
    from tasks.record import File
    from tasks.results.models import (
        Anchors,
        Bank,
        Clusters,
        Compared,
        Embedded,
        Prepared,
        Recipes,
        Setting,
    )

SEEDS = (100, 101, 102, 103)
METHODS: tuple[MethodName, ...] = ("base", "merge_only", "mta", "mixture_of_answers")
SHARE = "share_of_attainable"


@dataclass(frozen=True)
class Rung:
    """What of a run is replaced, and what the rung is to be held against.

    settings: other than the preset's. epochs: times as many of meta-LoRAs, at least one. clusters:
    the anchors are the true archetypes, each of the users that have it first. items: each item goes
    to the archetype that it was answered by. weights: recipes are the true posterior of the
    archetypes.
    """

    what: str
    against: str = "today"
    settings: Mapping[str, Any] = field(default_factory=dict)
    epochs: float = 1.0
    clusters: bool = False
    items: bool = False
    weights: bool = False


MORE_PEOPLE = {"synthetic": {"anchor_candidates": 1000}}
# Base users are candidates, too: 1,100 in all, where MORE_PEOPLE has 1,200.
LARGER_BASE = {"synthetic": {"base_users": 1000}, "base": {"tiny": {"steps": 3000}}}
RUNGS = {
    "today": Rung("the preset, without vectors"),
    "clusters": Rung("true archetypes as clusters", clusters=True),
    "items": Rung("items dealt to archetypes", "clusters", clusters=True, items=True),
    "weights": Rung("true posterior weights", "clusters", clusters=True, weights=True),
    "epochs": Rung("ten times the epochs", "clusters", epochs=10, clusters=True),
    "people": Rung("four times the people", "clusters", MORE_PEOPLE, epochs=0.25, clusters=True),
    "base": Rung(
        "base: 1,000 users, 3,000 steps", "people", LARGER_BASE, epochs=0.25, clusters=True
    ),
    "all": Rung(
        "all, but for the epochs", "base", LARGER_BASE, epochs=0.25,
        clusters=True, items=True, weights=True,
    ),
}  # fmt: skip


def cell(rung: Rung, lamp_task: str, seed: int) -> Compared:
    """One world's comparison under a rung, by the stages of a run."""
    from flows.lamp_task import Common, all_answers
    from tasks.base_model import base_model
    from tasks.compare import compared
    from tasks.config.run import resolve
    from tasks.prepare import prepared_users
    from tasks.results.models import Merged
    from tasks.results.run import Merging

    given = {"lamp_tasks": [lamp_task], "methods": list(METHODS), "items_curve": []}
    given |= {"seed": seed, "fusion": {"vectors": False}} | dict(rung.settings)
    config = resolve(given).for_task(lamp_task, seed)
    users = prepared_users(config)
    common = Common(config, users, base_model(config, users))
    own = config.method("mta")
    setting = common.setting(own)
    chosen, members, embedded = bank_of(rung, config, own, users, setting)
    recipes = weighed(rung, config, own, users, members, embedded, setting)
    merged = Merged(bank=members, recipes=recipes, how=own.fusion.merge)
    merging = Merging(methods=METHODS[1:], embedded=embedded, chosen=chosen, merged=merged)
    answered = all_answers(common, [merging])
    if common.missing:
        raise RuntimeError(common.missing[0])
    return compared(config, users, answered)


def bank_of(
    rung: Rung, config: TaskConfig, own: MethodConfig, users: Prepared, setting: Setting
) -> tuple[Anchors, Bank, Embedded]:
    """The bank of a rung's anchors; embedded: of the users, or stand-ins that say nothing."""
    from tasks.anchors import anchors, clusters
    from tasks.bank import bank, meta_lora
    from tasks.embed import embedded_users
    from tasks.running.jobs import batches_of

    epochs = max(1, round(own.meta_lora.epochs * rung.epochs))
    training = own.meta_lora.model_copy(update={"epochs": epochs})
    if rung.clusters:
        candidates, embedded, found = true_clusters(config, users, rung.items)
    else:
        candidates = users.anchor
        embedded = embedded_users(own, users, setting.questions, setting.base, config.compute)
        found = clusters(own.anchors, embedded, setting.seed)
    chosen = anchors(own.anchors, embedded, candidates, found)
    jobs = [
        meta_lora.submit(training, part, candidates, setting)
        for part in batches_of(chosen.anchors, own.anchors.per_job)
    ]
    loras = tuple(lora for job in jobs for lora in job.result().loras)
    return chosen, bank(loras, chosen, config.name), embedded


def true_clusters(
    config: TaskConfig, users: Prepared, items: bool
) -> tuple[File, Embedded, Clusters]:
    """The candidates by their first archetype, or (items) once per archetype with its items."""
    from tasks.lamp.tables import read_table
    from tasks.results.models import Clusters, Embedded
    from tasks.results.store import store

    table, archetypes = dealt(config, read_table(store().path(users.anchor)), items)
    names = [*product(["anchor"], table["user_id"]), *product(["few_shot"], users.few_shot_ids)]
    frame = pl.DataFrame(names, ["role", "user_id"], orient="row")
    vectors = np.ones((len(frame), 2), np.float32)
    frame = frame.with_columns(vector=pl.Series(vectors).arr.to_list())
    with store().new("ladder") as folder:
        table.write_parquet(folder.path / "anchor.parquet")
        frame.write_parquet(folder.path / "embeddings.parquet")
    embedded = Embedded(
        table=folder.file("embeddings.parquet"), centred=False, users=len(frame), dimensions=2
    )
    return folder.file("anchor.parquet"), embedded, Clusters(clusters=tuple(archetypes))


def weighed(
    rung: Rung, config: TaskConfig, own: MethodConfig, users: Prepared, members: Bank,
    embedded: Embedded, setting: Setting,
) -> Recipes:  # fmt: skip
    """Recipes by the anchors' evidence, or by the true posterior of archetypes."""
    from tasks.fusion import merged_loras
    from tasks.recipes import TABLE, recipes_of, write_recipes
    from tasks.results.models import Recipes
    from tasks.results.store import store

    if not rung.weights:
        return merged_loras(own.fusion, embedded, members, users.few_shot, setting).recipes
    ids = users.few_shot_ids
    numbers = [int(name.removeprefix("cluster-")) for name in members.names]
    shares = weights(config, ids)[:, numbers]
    shares /= shares.sum(axis=1, keepdims=True)
    order = np.argsort(-shares, axis=1, kind="stable")
    shares = np.take_along_axis(shares, order, axis=1)
    with store().new("ladder") as folder:
        chosen = order, np.zeros_like(shares), shares
        write_recipes(folder.path, ids, recipes_of(members.names, chosen))
    return Recipes(
        table=folder.file(TABLE), users=len(ids), anchors_per_user=len(numbers),
        without_similar_anchor=0,
    )  # fmt: skip


def climb(seeds: Sequence[int], tasks: Sequence[str], rungs: Sequence[str]) -> list[dict[str, Any]]:
    """A row per rung and task: share of each method, the mean over the worlds, with intervals."""
    from tasks.compare import mean_of
    from tasks.running.slots import cpu_jobs, gpu_slots

    at_once = gpu_slots(cpu_jobs())
    rows = []
    for name in rungs:
        by_task: dict[str, list[Compared]] = {}
        for task in tasks:
            with ThreadPoolExecutor(at_once) as pool:
                jobs = [
                    pool.submit(copy_context().run, cell, RUNGS[name], task, seed) for seed in seeds
                ]
                by_task[task] = [job.result() for job in jobs]
            rows.append(_row(name, task, mean_of(by_task[task])))
        if len(tasks) > 1:
            everything = [one for own in by_task.values() for one in own]
            rows.append(_row(name, "all", mean_of(everything, ["score", SHARE])))
    return rows


def _row(rung: str, task: str, mean: Compared) -> dict[str, Any]:
    """A row of the table, which is printed as well."""
    shares = {name: mean.estimate(name, SHARE) for name in METHODS}
    texts = "  ".join(f"{name} {share.text('.2f')}" for name, share in shares.items())
    print(f"{rung:9} {task:8} {texts}", flush=True)
    numbers = {name: share.model_dump() for name, share in shares.items()}
    return {"rung": rung, "against": RUNGS[rung].against, "task": task, "shares": numbers}


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """`merge_only`'s share and its interval: a panel per task, a bar per rung."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(3 + 1.8 * len(tasks), 3), layout="constrained")
    figure.supxlabel("share of the attainable, 95 % intervals", fontsize=9)
    for number, task in enumerate(tasks):
        own = [row for row in rows if row["task"] == task]
        shares = [row["shares"]["merge_only"] for row in own]
        # What is not known is no number, and not drawn.
        table = [[one[key] for one in shares] for key in ("lo", "point", "hi")]
        lo, points, hi = np.array(table, dtype=float)
        axes = figure.add_subplot(1, len(tasks), number + 1)
        bars = axes.barh([RUNGS[row["rung"]].what for row in own], points, color="#9cb8d9",
                         xerr=np.abs([points - lo, hi - points]))  # fmt: skip
        axes.bar_label(bars, fmt=" %.2f", label_type="center", fontsize=8)
        axes.invert_yaxis()
        axes.set(title=task, xlim=(min(0.0, np.nanmin([lo, points])), 1))
        if number:
            axes.set_yticklabels([])
    FigureCanvasAgg(figure).print_figure(file, dpi=120)


def main() -> int:
    from infra.local.alone import local_server
    from tasks.config.options import SYNTHETIC_TASKS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--tasks", nargs="+", choices=SYNTHETIC_TASKS, default=SYNTHETIC_TASKS)
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    parser.add_argument("--to", type=Path, help="a folder for ladder.json and ladder.png")
    arguments = parser.parse_args()
    with local_server(Path(".mta/local").absolute()):
        from prefect import flow

        given = arguments.seeds, arguments.tasks, arguments.rungs
        rows = flow(climb, name="ladder", persist_result=False)(*given)
    if arguments.to:
        arguments.to.mkdir(parents=True, exist_ok=True)
        (arguments.to / "ladder.json").write_text(json.dumps(rows, indent=1) + "\n")
        draw(rows, arguments.to / "ladder.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

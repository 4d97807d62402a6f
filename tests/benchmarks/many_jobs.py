"""A million users' batches through the planner, the scheduler and the store, without a model.

    python -m tests.benchmarks.many_jobs                  1,000,000 users, 256 a job: half an hour
    python -m tests.benchmarks.many_jobs --users 20000 --length 1060      items of 300 tokens

Users of 10 items, written as a table, go through what answers for a run's
few-shot users (`all_answers` of flows/lamp_task.py): first under the planner, for the 8B shape,
whose plan is printed; then as jobs of one Prefect flow with a server of its own (sqlite), two
threads at once. In these everything is real, keys, recipes, the index of rows and what is written,
but the engine: it gives everybody one LoRA of 16 numbers, and the first label, and takes no GPU
slot, as on Ray. The same flow then runs again and finds it all.

The last line is one JSON object: seconds per 1,000 jobs, of the first and the last quarter (the
same where nothing grows with what is done), bytes per user in the store, and the highest memory of
this process in all of it and of the server at the end. docs/scale.md has figures. Exit code 1 when
an answer is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.record import key_of
from tasks.results.store import store

if TYPE_CHECKING:
    from tasks.config.run import RunConfig
    from tasks.config.task import TaskConfig
    from tasks.lamp.definitions import LampTask
    from tasks.results.models import Answers, Base, Prepared
    from tasks.results.run import Merging
    from tasks.stacking import Adapted, Batch

ITEMS, ANCHORS, TOP, BLOCK = 10, 50, 8, 2048
WORKERS = 2
SENTENCE = "a film about a ship that comes home "


def configuration(per_job: int) -> RunConfig:
    """8B on H200s, as measured there (docs/scale.md)."""
    from tasks.config.run import resolve

    return resolve(
        {
            "preset": "paper",
            "lamp_tasks": ["LaMP-2M"],
            "methods": ["mta"],
            "meta_lora": {"rank": 16},
            "fusion": {"top_m": TOP, "merge": "svd"},
            "stacking": {"rank": 4, "users_per_job": per_job},
            "prompt": {"history_items": 0},
            "compute": {"device": "cuda", "max_workers": WORKERS},
            "plan": {"peak_tflops": 774.0, "mfu": 0.536, "memory_gb": 141.0, "bandwidth_tb": 4.8},
        }
    )


def write_users(path: Path, count: int, role: str, task: LampTask, length: int) -> None:
    """A side's table (tasks/lamp/tables.py), BLOCK users a row group, texts of `length`."""
    from tasks.lamp.tables import SIDE, lists

    text, labels = (SENTENCE * length)[:length], task.labels

    def strings(numbers: pl.Series, template: str) -> pl.Series:
        names = numbers.cast(pl.String).str.zfill(7)
        return pl.select(pl.format(f"{role}-{template}", names)).to_series()

    def answers(numbers: pl.Series) -> pl.Series:
        return pl.Series(labels).gather(numbers % len(labels))

    with pq.ParquetWriter(path, SIDE, compression="zstd", write_statistics=["user_id"]) as writer:
        for first in range(0, count, BLOCK):
            numbers = pl.int_range(first, min(first + BLOCK, count), eager=True)
            items = pl.int_range(ITEMS * first, ITEMS * (first + len(numbers)), eager=True)
            profile = {"id": strings(items, "i{}"), "text": strings(items, f"{{}} {text}")}
            query = {"id": strings(numbers, "q{}"), "input": strings(numbers, f"{{}} {text}")}
            own = pl.DataFrame(profile | {"answer": answers(items)}).to_struct()
            asked = pl.DataFrame(query | {"gold": answers(numbers)}).to_struct()
            ones = np.ones(len(numbers), int)
            names = strings(numbers, "{}").to_arrow()
            columns = [names, names, lists(ITEMS * ones, own), lists(ones, asked)]
            writer.write_table(pa.table(columns, names=SIDE.names).cast(SIDE))


@dataclass(frozen=True)
class World:
    """What the stages before would have given."""

    config: RunConfig
    task: TaskConfig
    users: Prepared
    base: Base

    @classmethod
    def of(cls, config: RunConfig, count: int, length: int) -> World:
        from tasks.results.models import Base, Prepared

        task = config.for_task("LaMP-2M", 0)
        sides = {"base": 20, "anchor": ANCHORS, "few_shot": count}
        with store().new("prepare") as folder:
            for role, number in sides.items():
                write_users(folder.path / f"{role}.parquet", number, role, task.task, length)
        files = {role: folder.file(f"{role}.parquet") for role in sides}
        users = Prepared(
            task=task.task, **files, pooled=files["base"], instruction="", longest_candidate=ITEMS,
            few_shot_ids=tuple(f"few_shot-{n:07d}" for n in range(count)),
            counts={}, dropped={}, audit={},
        )  # fmt: skip
        base = Base(model=config.base.model, content="", dtype="bfloat16", max_tokens=8128)
        return cls(config, task, users, base)

    def merging(self) -> Merging:
        """Anchors' LoRAs and bank as planned, and a table of recipes."""
        from tasks.bank import bank, meta_lora
        from tasks.results.models import Anchor, Anchors, Embedded, Merged, Recipes
        from tasks.results.run import Merging
        from tasks.text.questions import setting_of

        own = self.task.method("mta")
        setting = setting_of(self.task, own, self.users, self.base)
        names = [f"anchor-{number:07d}" for number in range(ANCHORS)]
        anchors = tuple(Anchor(name=one, items=ITEMS, cluster=0, members=(one,)) for one in names)
        chosen = Anchors(
            table=self.users.anchor, anchors=anchors, whole_clusters=0, asked=ANCHORS,
            candidates=ANCHORS, eligible=ANCHORS, clusters=ANCHORS, noise=0,
        )  # fmt: skip
        loras = meta_lora.submit(own.meta_lora, anchors, self.users.anchor, setting).result().loras
        members = bank(loras, chosen, "simulated")
        count = len(self.users.few_shot_ids)
        some = pl.Series([[names[(n + m) % ANCHORS] for m in range(TOP)] for n in range(ANCHORS)])
        places = pl.Series([n % ANCHORS for n in range(count)])
        equal = pl.Series([[1 / TOP] * TOP]).gather(pl.zeros(count, pl.UInt32, eager=True))
        columns = {"similarities": equal, "weights": equal, "seconds": pl.zeros(count, eager=True)}
        with store().new("fusion") as folder:
            ids = {"user_id": self.users.few_shot_ids, "anchors": some.gather(places)}
            pl.DataFrame(ids | columns).write_parquet(folder.path / "recipes.parquet")
        recipes = Recipes(
            table=folder.file("recipes.parquet"), users=count, anchors_per_user=TOP,
            without_similar_anchor=0,
        )  # fmt: skip
        embedded = Embedded(table=self.users.anchor, centred=False, users=count, dimensions=1)
        merged = Merged(bank=members, recipes=recipes, how=own.fusion.merge)
        return Merging(methods=("mta",), embedded=embedded, chosen=chosen, merged=merged)

    def answered(self, merging: Merging) -> tuple[Answers, ...]:
        """Every batch's answers. Raises InputError where some are missing."""
        from flows.lamp_task import Common, all_answers
        from tasks.errors import InputError

        common = Common(self.task, self.users, self.base)
        found = all_answers(common, [merging])
        if common.missing:
            raise InputError(common.missing[0])
        return found["mta"]


@contextmanager
def fake_engine() -> Iterator[list[float]]:
    """Within, `mta` trains and answers with no model; gives the time at which each job ended."""
    import torch

    from tasks.lora.adapters import Lora
    from tasks.methods import METHODS
    from tasks.results.models import Training
    from tasks.text.questions import content

    lora, work = Lora({"layer": (torch.zeros(1, 8), torch.zeros(8, 1))}, 1.0), Training(items=ITEMS)
    ended: list[float] = []

    def adapt(batch: Batch) -> Adapted:
        assert batch.merger
        keys = [
            key_of(
                "simulated", user["user_id"], content(user["profile"]), batch.merger.made_of(name)
            )
            for user, name in zip(batch.users, batch.names, strict=True)
        ]
        return batch.stacked(keys, lambda numbers, _: [(lora, work)] * len(numbers))

    def answer(batch: Batch) -> list[list[str]]:
        ended.append(time.perf_counter())
        return [[batch.setting.questions.task.labels[0]] * len(u["query"]) for u in batch.users]

    real = METHODS["mta"]
    METHODS["mta"] = replace(real, adapt=adapt, answer=answer)
    try:
        yield ended
    finally:
        METHODS["mta"] = real


def planned(world: World) -> tuple[Merging, str]:
    """The bank, and what the run would take as the planner has it."""
    from tasks.plan.model import plan_model
    from tasks.plan.run import plan_text
    from tasks.plan.stages import Planner
    from tasks.stand_in import planned_by

    model = plan_model(world.config)
    planner = Planner(model)
    with planned_by(planner):
        merging = world.merging()
        world.answered(merging)
        planner.compare(world.users)
    return merging, plan_text(world.config, model, planner.plans)


def run(world: World, merging: Merging, home: Path) -> dict[str, Any]:
    """The jobs through Prefect, twice."""
    from infra.local.alone import local_server

    with local_server(home):
        from prefect import flow

        from tasks.running.runner import running

        @flow(name="simulated", persist_result=False)
        def simulated() -> None:
            with running(world.config):
                answered.append(world.answered(merging))

        answered: list[tuple[Answers, ...]] = []
        with fake_engine() as ended:
            started = time.perf_counter()
            simulated()
            seconds = time.perf_counter() - started
        jobs, quarter = len(ended), max(1, len(ended) // 4)
        ended.sort()
        each = [later - before for before, later in pairwise([started, *ended])]
        # One job fewer of the first quarter: it waits for libraries.
        first = sum(each[1:quarter]) / max(1, quarter - 1)
        figures: dict[str, Any] = {
            "jobs": jobs,
            "seconds": round(seconds, 1),
            "seconds_per_1000_jobs": round(1000 * seconds / jobs, 1),
            "first_quarter": round(1000 * first, 1),
            "last_quarter": round(1000 * sum(each[-quarter:]) / quarter, 1),
            "server_bytes": sum(one.memory_info().rss for one in psutil.Process().children(True)),
            "users_answered": sum(len(one.users) for one in answered[0]),
        }
        print(json.dumps(figures), flush=True)
        started = time.perf_counter()
        simulated()
        found = round(time.perf_counter() - started, 1)
        return figures | {"found_again_seconds": found}


def main() -> int:
    from tests.benchmarks.machine import CPU, peak_bytes

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--per-job", type=int, default=256, help="users of a job")
    parser.add_argument("--length", type=int, default=100, help="characters of an item's text")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"MTA_STORE": f"{name}/.mta/store", "HF_HUB_OFFLINE": "1"}
        world = World.of(configuration(given.per_job), given.users, given.length)
        started = time.perf_counter()
        merging, text = planned(world)
        planning, of_plan = round(time.perf_counter() - started, 1), peak_bytes(CPU)
        print(text, flush=True)
        figures = run(world, merging, Path(name) / "server")
        kept = dict.fromkeys(("stacking", "answers", "results"), 0.0)
        for part in kept:
            files = [file for file in (store().root / part).rglob("*") if file.is_file()]
            kept[part] = round(sum(file.stat().st_size for file in files) / given.users, 1)
    figures |= {
        "users": given.users,
        "plan_seconds": planning,
        "plan_peak_bytes": of_plan,
        "peak_bytes": peak_bytes(CPU),
        "bytes_per_user": kept,
    }
    print(json.dumps(figures))
    return 0 if figures["users_answered"] == given.users else 1


if __name__ == "__main__":
    sys.exit(main())

"""The flow `mta`: LaMP tasks through the stages of Merge-then-Adapt, then one comparison.

    prefect deployment run mta/full-benchmark -p seed=1 -p 'stacking={"rank": 8}'

runs it on the worker; without any server, for debugging:

    mta run -p seed=1 -p 'stacking={"rank": 8}'
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Before Prefect is imported: its threads know the settings that it finds then.
    from tasks.tools.main import main

    raise SystemExit(main(["run", *sys.argv[1:]]))

from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from datetime import datetime
from itertools import product
from typing import Annotated, Any, Literal

from prefect import State, flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import Field

from flows.lamp_task import lamp_task, noted
from flows.tune import tuned, with_settings
from tasks.compare import overall
from tasks.config import options
from tasks.config.run import RunConfig, resolve
from tasks.errors import DiskFull, InputError, disk_full
from tasks.lamp.options import (
    LampOptions,
    PromptOptions,
    SplitOptions,
    SyntheticOptions,
    TaskOptions,
)
from tasks.log import log
from tasks.methods import MethodName
from tasks.record import Options
from tasks.report.files import report_name, write_run
from tasks.report.notes import data_lines
from tasks.report.publish import publish
from tasks.results.models import Compared
from tasks.results.run import Cell, Run
from tasks.results.stage import CELL, StageFailed
from tasks.results.store import store
from tasks.running.runner import everywhere, running, side_by_side
from tasks.tracking.runs import log_ended, tracked

Seed = Annotated[int, Field(ge=0, lt=2**32)]


@flow(name="mta", persist_result=False)
def mta(
    preset: options.PresetName = "embedded",
    data: str | None = None,
    lamp_tasks: list[str] | None = None,
    task: TaskOptions | str | None = None,
    methods: list[MethodName] | Literal["all"] | None = None,
    items_curve: list[Annotated[int, Field(ge=1)]] | None = None,
    seed: Seed | None = None,
    seeds: list[Seed] | None = None,
    synthetic: SyntheticOptions | None = None,
    lamp: LampOptions | None = None,
    model: str | None = None,
    split: SplitOptions | Literal["grouped", "published"] | None = None,
    prompt: PromptOptions | None = None,
    base: options.BaseOptions | None = None,
    anchors: options.AnchorOptions | None = None,
    bank: options.BankOptions | None = None,
    meta_lora: options.TrainingOptions | None = None,
    fusion: options.FusionOptions | None = None,
    stacking: options.StackingOptions | None = None,
    oppu: options.TrainingOptions | None = None,
    rag: options.RagOptions | None = None,
    label_prior: options.PriorOptions | None = None,
    scoring: options.ScoringOptions | None = None,
    per_task: dict[str, dict[str, Any]] | None = None,
    compute: options.ComputeOptions | None = None,
    mlflow: options.MlflowOptions | None = None,
    tune: bool | None = None,
    dry_run: bool | None = None,
    plan: options.PlanOptions | None = None,
) -> State[Any]:
    """Personalise one language model to many users, and measure it.

    Sections, such as `stacking`, replace only the fields given; tasks/config/options.py says what
    each is. All others:

    Args:
        preset: what everything else starts from: `embedded` (a tiny model, minutes on a laptop),
            `paper` (the published hyper-parameters and model) or `real` (a small real model).
        data: `synthetic`, `lamp` (the benchmark's own files, downloaded), a LaMP user file, or a
            folder of LaMP files.
        lamp_tasks: the LaMP tasks to run.
        task: one of your own, as a YAML or JSON file or its content; its users are `data`.
        methods: the methods that are compared (tasks/methods/), or `all`.
        items_curve: numbers of items per few-shot user to score again with, for the report.
        seed: decides every random choice.
        seeds: several of them: everything once per seed, compared over all.
        model: short for base.model.
        split: how users are divided where the data does not say; a text is its kind.
        meta_lora: how anchors' LoRAs are trained.
        oppu: the method `oppu`, one LoRA per user from scratch.
        per_task: sections that differ for a LaMP task: {"LaMP-3": {"stacking": {"rank": 2}}}.
        tune: choose settings of `mta` on development users first (flows/tune.py).
        dry_run: do nothing but say what the run would take: steps, FLOPs, memory, hours, disk.
    """
    return outcome({name: value for name, value in locals().items() if value is not None})


def outcome(given: dict[str, Any]) -> State[Any]:
    """The benchmark, or its plan, with the parameters that are given."""
    values = {
        name: value.model_dump(mode="json", exclude_unset=True)
        if isinstance(value, Options)
        else value
        for name, value in given.items()
    }
    try:
        config = everywhere(resolve(values))
        for line in data_lines(config):
            log(line, warning=True)
        store().sweep()
        if config.dry_run:
            # Not above: with torch and transformers, which a run that finds everything never loads.
            from tasks.plan.run import planned

            return planned(config, one_cell)
        with running(config):
            return benchmark(config)
    except InputError as error:
        # What a person can mend is said in one line; anything else keeps its traceback.
        log(str(error), warning=True)
        return Failed(message=str(error))
    except Exception as error:
        if full := disk_full(error):
            log(full, warning=True)
            return Failed(name=DiskFull.__name__, message=full)
        raise


def benchmark(config: RunConfig) -> State[Any]:
    """Every LaMP task under every seed, the comparison over all, the report, and MLflow."""
    run_id, name = str(flow_run.get_id()), flow_run.get_name() or "mta"
    settings = config.model_dump(mode="json")
    run = Run(id=run_id, name=name, date=now(), report=report_name(name, run_id), config=settings)
    with tracked(run) as page:
        shown = f"```json\n{config.model_dump_json(indent=2)}\n```"
        create_markdown_artifact(key="configuration", markdown=shown)
        if page:
            create_link_artifact(link=page, link_text="This run in MLflow", key="mlflow-run")
            log(f"MLflow: {page}")
        cells, missing = all_cells(config)
        if not cells:
            raise StageFailed("; ".join(missing))
        mean = overall(tuple(one.compared for one in cells))
        found = {"cells": tuple(cells), "overall": mean, "missing": tuple(missing)}
        run = run.model_copy(update={**found, "date": now()})
        # What was found out must not depend on MLflow answering.
        write_run(run)
        run = publish(run)
        write_run(run)
        late = log_ended(run)
    if run.missing:
        listed = "; ".join(run.missing)
        text = f"scored, but {len(run.missing)} pieces are missing: {listed}"[:1000]
        return Failed(name="Incomplete", message=text + late)
    text = f"{len(config.methods)} methods scored on {len(config.lamp_tasks)} LaMP tasks"
    return Completed(message=text + late)


def all_cells(config: RunConfig) -> tuple[list[Cell], list[str]]:
    """LaMP tasks and seeds, some at once, each in a thread of its own; and what is missing.

    One that fails leaves the others.
    """
    pairs = product(config.all_seeds, config.lamp_tasks)
    with ThreadPoolExecutor(side_by_side(config), thread_name_prefix="cell") as pool:
        # Prefect keeps what flow run this is, and the log, in the context.
        futures = [
            pool.submit(copy_context().run, one_cell, config, seed, name) for seed, name in pairs
        ]
        try:
            found = [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    missing = [line for _, lines in found for line in lines]
    return [cell for cell, _ in found if cell], missing


def one_cell(config: RunConfig, seed: int, name: str) -> tuple[Cell | None, list[str]]:
    """One LaMP task under one seed, with its curve; and what is missing of it."""
    own, tuning = config.for_task(name, seed), None
    CELL.set(own.name)
    try:
        if config.tune:
            tuning = tuned(own)
            own = with_settings(own, tuning.settings)
        cell = lamp_task(own)
    except InputError as error:
        return None, [f"{own.name}: {error}"]
    missing = list(cell.missing)
    curve: dict[int, Compared] = {}
    for items in config.items_curve:
        if items == own.split.few_shot_items:
            continue  # that is the cell itself
        CELL.set(f"{own.name}, {items} items")
        with noted(f"{own.name} with {items} items", missing):
            fewer = config.for_task(name, seed, items)
            fewer = with_settings(fewer, tuning.settings) if tuning else fewer
            point = lamp_task(fewer, known=cell)
            curve[items] = point.compared
            missing += [f"with {items} items: {line}" for line in point.missing]
    found = {"curve": curve, "tuning": tuning, "missing": tuple(missing)}
    return cell.model_copy(update=found), missing


def now() -> str:
    """The time of this machine, to the minute."""
    return f"{datetime.now():%Y-%m-%d %H:%M}"

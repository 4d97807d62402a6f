"""The flow `mta`: LaMP tasks through the stages of Merge-then-Adapt, then one comparison.

prefect deployment run mta/full-benchmark -p seed=1   # on the worker
mta run -p seed=1 -p 'stacking={"rank": 8}'           # without any server, for debugging
"""

import sys

if __name__ == "__main__":
    # Before Prefect is imported: its threads use the settings of that moment.
    from tasks.tools.main import main

    raise SystemExit(main(["run", *sys.argv[1:]]))

from itertools import product
from typing import Annotated, Any, Literal

from prefect import State, flow
from prefect.runtime import flow_run
from prefect.states import Failed
from pydantic import Field

from flows.lamp_task import lamp_task
from flows.tune import tuned
from tasks.compare import overall
from tasks.config import options
from tasks.config.run import RunConfig, resolve
from tasks.config.trials import with_settings
from tasks.errors import DiskFull, InputError, disk_full
from tasks.lamp import options as lamp_options
from tasks.live import row_of, will_run
from tasks.log import log
from tasks.methods import MethodName
from tasks.record import Options
from tasks.report.files import begun, now, write_run
from tasks.report.notes import data_lines
from tasks.report.publish import announce, publish
from tasks.results.models import Compared
from tasks.results.run import Cell
from tasks.results.stage import StageFailed, within
from tasks.results.store import store
from tasks.running.jobs import ended, in_threads, noted
from tasks.running.runner import everywhere, running, side_by_side
from tasks.tracking.runs import log_ended, tracked

Seed = Annotated[int, Field(ge=0, lt=2**32)]


@flow(name="mta", persist_result=False)
def mta(
    preset: options.PresetName = "embedded",
    data: str | None = None,
    lamp_tasks: list[str] | None = None,
    task: lamp_options.TaskOptions | str | None = None,
    methods: list[MethodName] | Literal["all"] | None = None,
    items_curve: list[Annotated[int, Field(ge=1)]] | None = None,
    seed: Seed | None = None,
    seeds: list[Seed] | None = None,
    synthetic: lamp_options.SyntheticOptions | None = None,
    lamp: lamp_options.LampOptions | None = None,
    model: str | None = None,
    split: lamp_options.SplitOptions | Literal["grouped", "published"] | None = None,
    prompt: lamp_options.PromptOptions | None = None,
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

    Sections, such as `stacking`, replace only the fields given (docs/options.md).

    Args:
        preset: what everything else starts from: `embedded` (a tiny model, minutes on a laptop),
            `paper` (the published hyper-parameters and model) or `real` (a small real model).
        data: `synthetic`, `lamp` (the benchmark's files, downloaded), a LaMP user file, or a
            folder of LaMP files.
        lamp_tasks: the LaMP tasks to run.
        task: a task of yours, as a YAML or JSON file or its content; its users are `data`.
        methods: the methods that are compared (tasks/methods/), or `all`.
        items_curve: numbers of items per few-shot user to score again with, for the report.
        seed: decides every random choice.
        seeds: several seeds: everything runs once per seed and is compared over all.
        model: short for base.model.
        split: how users are divided if the data does not say; a text is short for `split.kind`.
        meta_lora: how anchors' LoRAs are trained.
        oppu: the method `oppu`, one LoRA per user from scratch.
        per_task: sections that differ for a LaMP task: {"LaMP-3": {"stacking": {"rank": 2}}}.
        tune: choose settings of `mta` on development users first (flows/tune.py).
        dry_run: only say what the run would take: steps, FLOPs, memory, hours, disk.
    """
    return outcome({name: value for name, value in locals().items() if value is not None})


def outcome(parameters: dict[str, Any]) -> State[Any]:
    """The benchmark, or its plan, with these parameters of the flow."""
    sections = {name: one for name, one in parameters.items() if isinstance(one, Options)}
    for name, section in sections.items():
        parameters[name] = section.model_dump(mode="json", exclude_unset=True)
    try:
        config = everywhere(resolve(parameters))
        for line in data_lines(config):
            log(line, warning=True)
        store().sweep()
        if config.dry_run:
            # Not above: it loads torch and transformers, which a fully cached run does without.
            from tasks.plan.run import planned

            return planned(config, one_cell)
        with running(config):
            return benchmark(config)
    except InputError as error:
        # What the user can mend is said in one line. Any other error keeps its traceback.
        log(str(error), warning=True)
        return Failed(message=str(error))
    except Exception as error:
        if full := disk_full(error):
            log(full, warning=True)
            return Failed(name=DiskFull.__name__, message=full)
        raise


def benchmark(config: RunConfig) -> State[Any]:
    """Every LaMP task under every seed, the comparison over all, the report, and MLflow."""
    run = begun(str(flow_run.get_id()), flow_run.get_name() or "mta", config)
    with tracked(run) as page:
        announce(config, page)
        cells, missing = all_cells(config)
        if not cells:
            raise StageFailed("; ".join(missing))
        mean = overall(tuple(one.compared for one in cells))
        update = {"cells": tuple(cells), "overall": mean, "missing": tuple(missing), "date": now()}
        run = run.model_copy(update=update)
        # Written before MLflow is asked, which may not answer.
        write_run(run)
        run = publish(run)
        write_run(run)
        late = log_ended(run)
    scored = f"{len(config.methods)} methods scored on {len(config.lamp_tasks)} LaMP tasks"
    return ended(scored, run.missing, late)


def all_cells(config: RunConfig) -> tuple[list[Cell], list[str]]:
    """The cells of all LaMP tasks and seeds, some at once, each in a thread; and what is missing.

    A cell that fails does not stop the others.
    """
    pairs = list(product(config.all_seeds, config.lamp_tasks))
    will_run(config.for_task(name, seed).name for seed, name in pairs)
    results = in_threads(lambda pair: one_cell(config, *pair), pairs, side_by_side(config))
    missing = [line for _, lines in results for line in lines]
    return [cell for cell, _ in results if cell], missing


def one_cell(config: RunConfig, seed: int, name: str) -> tuple[Cell | None, list[str]]:
    """One LaMP task under one seed, with its curve of `items_curve`; and what is missing of it."""
    task_config = config.for_task(name, seed)
    with within(task_config.name), row_of(task_config.name):
        try:
            tuning = tuned(task_config) if config.tune else None
            settings = tuning.settings if tuning else {}
            cell = lamp_task(with_settings(task_config, settings))
        except InputError as error:
            return None, [f"{task_config.name}: {error}"]
        missing = list(cell.missing)
        curve: dict[int, Compared] = {}
        for items in config.items_curve:
            if items == task_config.split.few_shot_items:
                continue  # that is the cell itself
            with noted(f"{task_config.name} with {items} items", missing), within(f"{items} items"):
                other = with_settings(config.for_task(name, seed, items), settings)
                point = lamp_task(other, known=cell)
                curve[items] = point.compared
                missing += [f"with {items} items: {line}" for line in point.missing]
    update = {"curve": curve, "tuning": tuning, "missing": tuple(missing)}
    return cell.model_copy(update=update), missing

"""The flow `mta`: LaMP tasks through the stages of Merge-then-Adapt, then one comparison.

    prefect deployment run mta/full-benchmark -p seed=1 -p 'stacking={"rank": 8}'

runs it on the worker; without any server, for debugging:

    python -m flows.mta -p seed=1 -p 'stacking={"rank": 8}'
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal

from prefect import State, flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import Field

from flows.cells import cells
from flows.dry_run import dry_run as dry_run_of
from flows.local_server import server_name
from tasks.compare import overall
from tasks.config import RunConfig, resolve
from tasks.errors import InputError, masked
from tasks.methods import MethodName
from tasks.options import (
    AnchorOptions,
    BaseOptions,
    ComputeOptions,
    FusionOptions,
    LampOptions,
    LampTaskName,
    Options,
    PlanOptions,
    PresetName,
    PromptOptions,
    RagOptions,
    ScoringOptions,
    SplitOptions,
    StackingOptions,
    SyntheticOptions,
    TrainingOptions,
)
from tasks.report.answers import identical
from tasks.report.data import report_data
from tasks.report.differences import difference_lines
from tasks.report.files import REPORT_FILE, TABLE_FILE, report_name, write_report, write_run
from tasks.report.html import report_html
from tasks.report.since import since, since_lines
from tasks.report.summary import data_lines, run_notes, run_summary
from tasks.report.table import mean_rows, rows, share_lines, table_text
from tasks.running.faults import DISK_FULL, disk_full
from tasks.running.runner import everywhere, runner_of, shared
from tasks.stage import StageFailed, flow_run_is_over, log, result_of, store
from tasks.store.checkpoints import sweep
from tasks.tracking.runs import Tracker


@flow(name="mta", persist_result=False)
def mta(
    preset: PresetName = "embedded",
    data: str | None = None,
    lamp_tasks: list[LampTaskName] | None = None,
    methods: list[MethodName] | None = None,
    items_curve: list[Annotated[int, Field(ge=1)]] | None = None,
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None,
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] | None = None,
    synthetic: SyntheticOptions | None = None,
    lamp: LampOptions | None = None,
    model: str | None = None,
    split: SplitOptions | Literal["grouped", "published"] | None = None,
    prompt: PromptOptions | None = None,
    base: BaseOptions | None = None,
    anchors: AnchorOptions | None = None,
    meta_lora: TrainingOptions | None = None,
    fusion: FusionOptions | None = None,
    stacking: StackingOptions | None = None,
    oppu: TrainingOptions | None = None,
    rag: RagOptions | None = None,
    scoring: ScoringOptions | None = None,
    per_task: dict[LampTaskName, dict[str, Any]] | None = None,
    compute: ComputeOptions | None = None,
    dry_run: bool | None = None,
    plan: PlanOptions | None = None,
) -> State[Any]:
    """Personalise one language model to many users, and measure it.

    Args:
        preset: the values everything else starts from: `embedded` (a tiny model, minutes on a
            laptop) or `paper` (the published hyper-parameters and model).
        data: `synthetic`, `lamp` (the benchmark's own files, downloaded), a LaMP user file, or a
            folder of LaMP files.
        lamp_tasks: the LaMP tasks to run.
        methods: the methods that are compared (tasks/methods.py).
        items_curve: numbers of items per few-shot user to score again with, for the report.
        seed: decides every random choice.
        seeds: several of them: everything once per seed, compared over all.
        synthetic: the generated world. This and the sections below replace only the fields given.
        lamp: which of the benchmark's files `data=lamp` takes, and from where.
        model: short for base.model.
        split: how users are divided where the data does not say; a text is its kind.
        prompt: how an item becomes a question.
        base: the frozen base model.
        anchors: how users are embedded, clustered, and anchors chosen.
        meta_lora: how anchors' LoRAs are trained.
        fusion: how a user's LoRA is merged from the bank.
        stacking: the tiny LoRA on top.
        oppu: the method `oppu`, one LoRA per user from scratch.
        rag: the method `rag`, items of the history in the prompt.
        scoring: how questions are answered.
        per_task: sections that differ for a LaMP task: {"LaMP-3": {"stacking": {"rank": 2}}}.
        compute: where it runs.
        dry_run: do nothing but say what the run would take: steps, FLOPs, memory, hours, disk.
        plan: the machine that `dry_run` estimates for.
    """
    given = {
        name: value.model_dump(mode="json", exclude_unset=True)
        if isinstance(value, Options)
        else value
        for name, value in locals().items()
        if value is not None
    }
    tracker = None
    try:
        config = everywhere(resolve(given))
        for known in data_lines(config):
            log(known, warning=True)
        store().sweep()
        sweep(store())
        if config.dry_run:
            return dry_run_of(config)
        tracker = Tracker(
            config,
            flow_run.get_name() or "mta",
            {
                "prefect_flow_run": str(flow_run.get_id()),
                "prefect_server": masked(server_name()),
            },
        )
        # A courtesy to the list of runs: whether it succeeds is nothing to this one.
        with contextlib.suppress(Exception):
            tracker.end_abandoned(flow_run_is_over)
        with shared(runner_of(config)), ThreadPoolExecutor(1, "mlflow") as telling:
            return _benchmark(config, tracker, telling)
    except (InputError, StageFailed) as error:
        # What a person can mend is said in one line; anything else keeps its traceback.
        log(str(error), warning=True)
        if tracker:
            tracker.fail(str(error))
        return Failed(message=str(error))
    except BaseException as error:
        line = disk_full(error)
        if tracker:
            tracker.fail(line or f"{type(error).__name__}: {error}")
        if line:
            log(line, warning=True)
            return Failed(name=DISK_FULL, message=line)
        raise
    finally:
        if tracker:
            tracker.close()


def _benchmark(config: RunConfig, tracker: Tracker, telling: ThreadPoolExecutor) -> State[Any]:
    """`telling`: the one thread that gives MLflow the LaMP tasks, while others go on."""
    _show_run(config, tracker)
    where = store()
    settings = config.model_dump(mode="json")
    summaries: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    missing: list[str] = []
    told: list[Future[None]] = []
    # Closed at once where this fails: those that wait are not begun.
    with contextlib.closing(cells(config)) as working:
        for found in working:
            missing += found.missing
            if found.summary is None:
                continue
            summaries.append(found.summary)
            own_rows = rows([found.summary], where)
            table += own_rows
            call = partial(tracker.log_lamp_task, found.summary, own_rows)
            # In this context, where Prefect keeps the log.
            told.append(telling.submit(copy_context().run, _track, missing, call))
            for one in told:
                if one.done():
                    one.result()  # raises where the disk is full
    if not summaries:
        raise StageFailed("; ".join(missing))
    mean = result_of(overall, [summary["compared"] for summary in summaries])
    means = mean_rows(mean)
    table += means
    # Files first: what was found out must not depend on MLflow answering.
    about = {"name": flow_run.get_name() or "mta", "date": f"{datetime.now():%Y-%m-%d %H:%M}"}
    about["report"] = report_name(about["name"], str(flow_run.get_id()))
    changed = since(where, settings, summaries)
    write_run(str(flow_run.get_id()), settings, summaries, about)
    data_notes = run_notes(config, summaries, where)
    noted = data_notes + share_lines(table) + difference_lines(mean, identical(summaries, where))
    noted += since_lines(changed)
    write_report(about["report"], TABLE_FILE, table_text(table, noted, missing))

    def gathered() -> dict[str, Any]:
        said = {"notes": data_notes, "missing": missing, "since": changed}
        data = report_data(config, about, summaries, mean, table, said, where)
        where.confirm()
        return data

    def report() -> None:
        data = gathered()
        text = report_html(data)
        # What is logged after the LaMP tasks must be logged after them.
        wait(told)
        _show_report(about["report"], text, tracker)
        tracker.describe(run_summary(data))

    shown = list(missing)
    _try(missing, "the report was not made or not logged", report)
    for one in told:
        one.result()
    _track(
        missing, lambda: tracker.finish(table, means, table_text(table, noted, missing), missing)
    )
    missing += tracker.spool.refused
    behind = tracker.spool.behind()
    if behind:
        noted.append(behind)
        data_notes.append(behind)
    if missing != shown or behind:
        # What was not logged is missing, too: the report beside the store says so, if it can.
        with contextlib.suppress(Exception):
            write_report(about["report"], REPORT_FILE, report_html(gathered()))
    text = table_text(table, noted, missing)
    write_report(about["report"], TABLE_FILE, text)
    log("comparison\n" + text)
    create_table_artifact(
        key="comparison",
        table=[{key: str(value) for key, value in row.items()} for row in table],
        description="\n\n".join(["Methods on the same users, prompts and seed.", *noted, *missing]),
    )
    late = f"; {behind}" if behind else ""
    if missing:
        text = f"scored, but {len(missing)} pieces are missing: {'; '.join(missing)}"[:1000]
        return Failed(name="Incomplete", message=text + late)
    text = f"{len(config.methods)} methods scored on {len(config.lamp_tasks)} LaMP tasks"
    return Completed(message=text + late)


def _track(missing: list[str], call: Callable[[], None]) -> None:
    """Log to MLflow; what cannot be logged, though MLflow would take it, is named as missing."""
    _try(missing, "MLflow did not get all of the run", call)


def _try(missing: list[str], problem: str, call: Callable[[], None]) -> None:
    """What comes after the scores must not lose them: a failure is named in `missing`."""
    try:
        call()
    except Exception as error:
        if disk_full(error):
            raise
        why = masked(" ".join(str(error).split()))[:200]
        missing.append(f"{problem} ({type(error).__name__}: {why})")
        log(missing[-1], warning=True)


def _show_report(name: str, text: str, tracker: Tracker) -> None:
    """The report beside the store, in MLflow, and the way to it in the Prefect UI."""
    path = write_report(name, REPORT_FILE, text)
    log(f"report: {path}")
    link = tracker.log_report(text, REPORT_FILE)
    if link:
        create_link_artifact(link=link, link_text="The report in MLflow", key="report")
    else:
        create_markdown_artifact(key="report", markdown=f"The report is in `{path}`.")


def _show_run(config: RunConfig, tracker: Tracker) -> None:
    """The resolved configuration and the way to MLflow, in the Prefect UI."""
    create_markdown_artifact(
        key="configuration", markdown=f"```json\n{config.model_dump_json(indent=2)}\n```"
    )
    if tracker.url:
        create_link_artifact(link=tracker.url, link_text="This run in MLflow", key="mlflow-run")
        log(f"MLflow: {tracker.url}\nits methods side by side: {tracker.methods_url}")


if __name__ == "__main__":
    from flows.local import main

    raise SystemExit(main())

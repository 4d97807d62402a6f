"""One LaMP task through the stages of MTA: prepare, base model, anchors, bank, fusion, stacking,
scoring. What runs and in which order; the work itself is in `tasks/`."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import asdict
from typing import Any

from prefect import State, flow
from prefect.futures import as_completed
from prefect.states import Completed, Failed

from tasks.anchors import anchors
from tasks.base_model import base_model
from tasks.config import RunConfig
from tasks.embedding import embed
from tasks.errors import label
from tasks.evidence import evidence
from tasks.fusion import fusion
from tasks.lamp.definitions import get_task
from tasks.lamp.metrics import rules_of
from tasks.meta_lora import bank, meta_lora
from tasks.methods import METHODS, MethodName, bank_kind
from tasks.prepare import prepare
from tasks.refit import refit
from tasks.running.faults import DISK_FULL, DiskFull
from tasks.running.progress import Progress
from tasks.scoring import predict, score
from tasks.stacking import Inputs, stacking
from tasks.stage import (
    Result,
    StageFailed,
    log,
    reason,
    result_of,
    state_of,
    stop_if_full,
    submit_each,
)
from tasks.store.pieces import digest
from tasks.task_adapt import task_adapt

Config = dict[str, Any]
# Banks that were just made, by method, as `stages` gives them: to ask for each anchor again is a
# job each, and jobs are what a run costs that finds everything.
BANKS: ContextVar[dict[str, Any] | None] = ContextVar("banks", default=None)


@flow(name="lamp-task", flow_run_name="{lamp_task}", persist_result=False)
def run_lamp_task(config: Config, lamp_task: str) -> State[Any]:
    """Completed with the summary of one LaMP task (`stages`), or Failed with one line."""
    try:
        return Completed(data=stages(config, lamp_task))
    except StageFailed as error:
        return Failed(message=str(error))
    except DiskFull as error:
        return Failed(name=DISK_FULL, message=str(error))


def stages(config: Config, lamp_task: str) -> dict[str, Any]:
    """The summary of one LaMP task: results of every stage by reference, and what is missing.

    Raises StageFailed, in one line, when a stage that all others need gave nothing.
    """
    missing: list[str] = []
    prepared = result_of(prepare, config, lamp_task)
    base = result_of(base_model, config, lamp_task, prepared)
    if config["base"]["task_adapt"]["enabled"]:
        base = base | {"adapter": result_of(task_adapt, config, lamp_task, prepared, base)}
    methods: list[MethodName] = config["methods"]
    options = RunConfig.model_validate(config)
    configs = {method: options.for_method(method).model_dump(mode="json") for method in methods}
    banks, bank_of = banks_of(configs, lamp_task, prepared, base, missing)
    methods = [name for name in methods if name in bank_of or not METHODS[name].merged]
    if not methods:
        raise StageFailed(missing[0])
    batches = dict(enumerate(chunks(prepared["value"]["few_shot"], config)))
    trained: dict[tuple[MethodName, int], Result] = {}
    answered: dict[tuple[MethodName, int], Result] = {}
    for method in methods:
        own = banks.get(bank_of.get(method, ""), {})
        given = asdict(Inputs(prepared, base, own.get("bank"), own.get("fusion")))
        work = [(method, number) for number in batches]
        if METHODS[method].trained:
            futures = submit_each(
                stacking,
                (configs[method], lamp_task, given, method),
                (list(batches), list(batches.values())),
            )
            found = collect(
                futures, work, "training of", f"{lamp_task}: {method}, training", missing
            )
            trained |= found
            missing += not_finite(method, list(found.values()))
            work = [key for key in work if key in found]
        numbers = [number for _, number in work]
        lists = (numbers, [batches[n] for n in numbers], [trained.get(key) for key in work])
        futures = submit_each(predict, (configs[method], lamp_task, given, method), lists)
        answered |= collect(
            futures, work, "answers of", f"{lamp_task}: {method}, answering", missing
        )
    # Methods are compared on the same users: a batch that one method lacks is left out of all.
    complete = [n for n in batches if all((method, n) in answered for method in methods)]
    if not complete:
        raise StageFailed(f"{lamp_task}: no batch of users could be scored; {missing[0]}")
    scores = {}
    rules = rules_of(get_task(lamp_task), options.scoring.metrics, options.scoring.tokens)
    for method in methods:
        parts = [answered[method, number] for number in complete]
        scores[method] = result_of(score, lamp_task, method, parts, rules)
    return {
        "lamp_task": lamp_task,
        "prepared": prepared,
        "base": base,
        "banks": banks,
        "bank_of": bank_of,
        "stacking": {m: [trained[m, n] for n in complete] for m in methods if METHODS[m].trained},
        "answered": {m: [answered[m, n] for n in complete] for m in methods},
        "scores": scores,
        "missing": missing,
    }


def banks_of(
    configs: dict[MethodName, Config],
    lamp_task: str,
    prepared: Result,
    base: Result,
    missing: list[str],
) -> tuple[dict[MethodName, dict[str, Any]], dict[MethodName, MethodName]]:
    """The banks of the methods that merge, and which of them each method takes.

    Methods that choose and merge anchors by the same options share what comes of it, by the name of
    the first. A method whose bank or recipes cannot be made has none, and is named in `missing`.
    """
    banks: dict[MethodName, dict[str, Any]] = {}
    bank_of: dict[MethodName, MethodName] = {}
    failed: list[dict[str, Any]] = []
    merging = {name: own for name, own in configs.items() if METHODS[name].merged}
    for method, config in merging.items():
        kind = bank_kind(config)
        if kind in failed:
            continue
        first = next((name for name, own in banks.items() if own["kind"] == kind), method)
        if first == method:
            over = made_over(kind, prepared, base)
            known = known_bank(method, over)
            try:
                made = bank_and_recipes(config, lamp_task, prepared, base, known, missing)
            except StageFailed as error:
                failed.append(kind)
                sharing = ", ".join(name for name, own in merging.items() if bank_kind(own) == kind)
                missing.append(f"{lamp_task}: {sharing}: {error}")
                log(f"missing: {missing[-1]}", warning=True)
                continue
            banks[method] = {"kind": kind, "over": over, **made}
        bank_of[method] = first
    return banks, bank_of


def made_over(kind: dict[str, Any], prepared: Result, base: Result) -> str:
    """A digest of what decides a bank, beside who is chosen: settings, base, anchors' histories."""
    value = prepared["value"]
    adapter: Any = base.get("adapter")
    return digest(
        {
            "kind": kind,
            "base": [base["ref"], adapter and adapter["ref"]],
            "anchors": value["sha256"]["anchor"],
            "instruction": value["instruction"],
        }
    )


def known_bank(method: str, over: str) -> dict[str, Any]:
    """The method's bank in `BANKS`, if it was made over the same; else nothing."""
    known: dict[str, Any] = (BANKS.get() or {}).get(method, {})
    return known if known.get("over") == over else {}


def bank_and_recipes(
    config: Config,
    lamp_task: str,
    prepared: Result,
    base: Result,
    known: dict[str, Any],
    missing: list[str],
) -> dict[str, Any]:
    """Anchors chosen and trained, the bank of them, and every few-shot user's recipe.

    known: a bank `made_over` the same, which is taken where the same anchors are chosen; those that
    failed then are not tried again. Raises StageFailed when no anchor could be trained.
    """
    embedded = result_of(embed, config, lamp_task, prepared, base)
    refitted = None
    if config["anchors"]["refits"] and config["anchors"]["train_on"] != "user":
        refitted = result_of(refit, config, lamp_task, prepared, base, embedded)
    chosen = result_of(anchors, config, lamp_task, prepared, embedded, refitted)
    if known and known["anchors"]["value"] == chosen["value"]:
        trained, banked = known["meta_loras"], known["bank"]
    else:
        trained, banked = train_bank(config, lamp_task, prepared, base, chosen, missing)
    weighed = None
    if config["fusion"]["weights"] == "evidence":
        weighed = result_of(evidence, config, lamp_task, prepared, base, embedded, banked)
    return {
        "embedded": embedded,
        "anchors": chosen,
        "meta_loras": trained,
        "bank": banked,
        "evidence": weighed,
        "fusion": result_of(fusion, config, lamp_task, embedded, banked, weighed),
    }


def train_bank(
    config: Config,
    lamp_task: str,
    prepared: Result,
    base: Result,
    chosen: Result,
    missing: list[str],
) -> tuple[dict[str, Result], Result]:
    """The LoRAs of the chosen anchors, by user id, and the bank of them.

    Raises StageFailed when no anchor could be trained.
    """
    listed = chosen["value"]["anchors"]
    size = config["anchors"]["per_job"]
    jobs = [listed[start : start + size] for start in range(0, len(listed), size)]
    futures = submit_each(meta_lora, (config, lamp_task, prepared, base), (jobs,))
    names = [tuple(anchor["user_id"] for anchor in job) for job in jobs]
    found = collect(futures, names, "anchor", f"{lamp_task}: meta-LoRAs", missing)
    trained: dict[str, Result] = {}
    for job, results in found.items():
        for anchor, result in zip(job, results, strict=True):
            if isinstance(result, str):
                missing.append(result)
            else:
                trained[anchor] = result
    if not trained:
        raise StageFailed(f"{lamp_task}: no anchor could be trained; {missing[0]}")
    users = {anchor["user_id"]: anchor["members"] for anchor in listed}
    return trained, result_of(bank, list(trained.values()), users)


def not_finite(method: MethodName, shards: list[Result]) -> list[str]:
    """A line for each user whose training had to stop."""
    return [
        f"{method}, training of user {label(user)}: the loss stopped being finite at step "
        f"{work['steps']}; lower {METHODS[method].trained}.learning_rate"
        for shard in shards
        for user, work in zip(shard["value"]["users"], shard["value"]["work"], strict=True)
        if work["failed"]
    ]


def chunks(user_ids: list[str], config: Config) -> list[list[str]]:
    """Users in batches of `stacking.users_per_job`: one task run each, never one per user."""
    size = config["stacking"]["users_per_job"]
    return [user_ids[start : start + size] for start in range(0, len(user_ids), size)]


def collect(
    futures: Any, keys: list[Any], what: str, title: str, missing: list[str]
) -> dict[Any, Any]:
    """Results of mapped runs by key, in order; those that failed are named in `missing`.

    One failure leaves the others; whether what is left is enough is for the caller to say. Raises
    DiskFull as soon as one ended for want of disk: those that wait are not begun.
    """
    progress = Progress("jobs", title, len(keys))
    for future in as_completed(list(futures)):
        stop_if_full(state_of(future))
        progress.advance()
    results: dict[Any, Any] = {}
    for key, future in zip(keys, futures, strict=True):
        name = " ".join([what, *(label(str(part)) for part in key)])
        state = state_of(future)
        if state.is_completed():
            results[key] = state.result()
        else:
            missing.append(reason(state, name))
            log(f"missing: {missing[-1]}", warning=True)
    return results

"""One LaMP task through the stages of MTA: prepare, base model, anchors, bank, fusion, stacking,
scoring. What runs and in which order; the work itself is in `tasks/`."""

from __future__ import annotations

from typing import Any

from prefect import State, flow, unmapped
from prefect.futures import as_completed
from prefect.states import Completed, Failed

from tasks.anchors import anchors
from tasks.base_model import base_model
from tasks.embedding import embed
from tasks.fusion import fusion
from tasks.meta_lora import bank, meta_lora
from tasks.prepare import prepare
from tasks.scoring import predict, score
from tasks.stacking import stacking
from tasks.stage import Progress, Result, StageFailed, log, reason, result_of


@flow(
    name="lamp-task",
    flow_run_name="{lamp_task}",
    persist_result=False,
)
def run_lamp_task(config: dict[str, Any], lamp_task: str) -> State[Any]:
    """Completed with the summary of one LaMP task (`stages`), or Failed with one line."""
    try:
        return Completed(data=stages(config, lamp_task))
    except StageFailed as error:
        return Failed(message=str(error))


def stages(config: dict[str, Any], lamp_task: str) -> dict[str, Any]:
    """The summary of one LaMP task: results of every stage by reference, and what is missing.

    Raises StageFailed, in one line, when a stage that all others need gave nothing.
    """
    missing: list[str] = []
    prepared = result_of(prepare, config, lamp_task)
    base = result_of(base_model, config, lamp_task, prepared)
    embedded = result_of(embed, config, lamp_task, prepared, base)
    chosen = result_of(anchors, config, lamp_task, prepared, embedded)

    anchor_ids = [anchor["user_id"] for anchor in chosen["value"]["anchors"]]
    futures = meta_lora.map(
        unmapped(config), unmapped(lamp_task), unmapped(prepared), unmapped(base), anchor_ids
    )
    trained = collect(futures, anchor_ids, "anchor", f"{lamp_task}: meta-LoRAs", missing)
    if not trained:
        raise StageFailed(f"{lamp_task}: no anchor could be trained; {missing[0]}")
    banked = result_of(bank, list(trained.values()))
    fused = result_of(fusion, config, lamp_task, embedded, banked)

    inputs = {"prepared": prepared, "base": base, "banked": banked, "fused": fused}
    methods: list[str] = config["scoring"]["methods"]
    batches = dict(enumerate(chunks(prepared["value"]["few_shot"], config)))
    stacked: dict[int, Result] = {}
    if "mta" in methods:
        futures = stacking.map(
            unmapped(config),
            unmapped(lamp_task),
            unmapped(inputs),
            list(batches),
            list(batches.values()),
        )
        stacked = collect(
            futures, list(batches), "stacking batch", f"{lamp_task}: stacking", missing
        )
        batches = {number: ids for number, ids in batches.items() if number in stacked}
        missing += [
            f"stacking of user {user}: the loss stopped being finite at step {work['steps']}; "
            "lower stacking.learning_rate"
            for shard in stacked.values()
            for user, work in zip(shard["value"]["users"], shard["value"]["work"], strict=True)
            if work["failed"]
        ]

    work = [(method, number) for method in methods for number in batches]
    futures = predict.map(
        unmapped(config),
        unmapped(lamp_task),
        unmapped(inputs),
        [method for method, _ in work],
        [number for _, number in work],
        [batches[number] for _, number in work],
        [stacked.get(number) if method == "mta" else None for method, number in work],
    )
    answered = collect(futures, work, "answers of", f"{lamp_task}: answering", missing)
    # Methods are compared on the same users: a batch that one method lacks is left out of all.
    complete = [n for n in batches if all((method, n) in answered for method in methods)]
    if not complete:
        raise StageFailed(f"{lamp_task}: no batch of users could be scored; {missing[0]}")
    scores = {}
    for method in methods:
        parts = [answered[method, number] for number in complete]
        scores[method] = result_of(score, lamp_task, method, parts)
    return {
        "lamp_task": lamp_task,
        "prepared": prepared,
        "base": base,
        "embedded": embedded,
        "anchors": chosen,
        "meta_loras": trained,
        "bank": banked,
        "fusion": fused,
        "stacking": [stacked[number] for number in complete if number in stacked],
        "answered": {m: [answered[m, number] for number in complete] for m in methods},
        "scores": scores,
        "missing": missing,
    }


def chunks(user_ids: list[str], config: dict[str, Any]) -> list[list[str]]:
    """Users in batches of `stacking.users_per_job`: one task run each, never one per user."""
    size = config["stacking"]["users_per_job"]
    return [user_ids[start : start + size] for start in range(0, len(user_ids), size)]


def collect(
    futures: Any, keys: list[Any], what: str, title: str, missing: list[str]
) -> dict[Any, Result]:
    """Results of mapped runs by key, in order; those that failed are named in `missing`.

    One failure leaves the others; whether what is left is enough is for the caller to say.
    """
    progress = Progress(title.split(": ")[-1].lower().replace(" ", "-"), title, len(keys))
    for _ in as_completed(list(futures)):
        progress.advance()
    results: dict[Any, Result] = {}
    for key, future in zip(keys, futures, strict=True):
        name = " ".join([what, *map(str, key if isinstance(key, tuple) else (key,))])
        # Without `wait` the state would be asked of the server, which may not know the end yet.
        future.wait()
        if future.state.is_completed():
            results[key] = future.state.result()
        else:
            missing.append(reason(future.state, name))
            log(f"missing: {missing[-1]}", warning=True)
    return results

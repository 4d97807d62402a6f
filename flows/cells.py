"""Every LaMP task under every seed, some of them at once: sub-flow, comparison, curve and maps."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from flows.lamp_task import BANKS, run_lamp_task
from tasks.compare import compare
from tasks.config import RunConfig
from tasks.report.table import users_map
from tasks.running.runner import side_by_side
from tasks.stage import StageFailed, result_of


@dataclass
class Found:
    """What came of one LaMP task under one seed: its summary, if there is one; what is missing."""

    summary: dict[str, Any] | None
    missing: list[str]


def cells(config: RunConfig) -> Generator[Found]:
    """LaMP tasks and seeds, some at once, each in a thread of its own; in the order configured.

    One that fails leaves the others.
    """
    pairs = product(config.all_seeds, config.lamp_tasks)
    pool = ThreadPoolExecutor(side_by_side(config), thread_name_prefix="lamp-task")
    try:
        calls = [partial(_cell, config, seed, lamp_task) for seed, lamp_task in pairs]
        # Prefect keeps what flow run this is, and the log, in the context.
        futures = [pool.submit(partial(copy_context().run, call)) for call in calls]
        for future in futures:
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _cell(config: RunConfig, seed: int, lamp_task: str) -> Found:
    """One LaMP task under one seed: its stages, the comparison, the curve and the maps."""
    own_settings = config.for_task(lamp_task, seed).model_dump(mode="json")
    missing: list[str] = []
    try:
        summary = result_of(run_lamp_task, own_settings, lamp_task)
        summary |= {"seed": seed, "several_seeds": len(config.all_seeds) > 1}
        summary["compared"] = result_of(
            compare, own_settings, lamp_task, summary["prepared"], summary["scores"]
        )
    except StageFailed as error:
        return Found(None, [str(error)])
    # However many items few-shot users have, the bank is the one of the run itself.
    given = BANKS.set(summary["banks"])
    try:
        summary["curve"] = {
            items: _with_items(own_settings, lamp_task, items, missing)
            for items in config.items_curve
            if items != config.split.few_shot_items  # that is the run itself
        }
    finally:
        BANKS.reset(given)
    for method, own in summary["banks"].items():
        own["map"] = _map(f"{lamp_task}, {method}", own, missing)
    return Found(summary, missing + summary["missing"])


def _with_items(
    settings: dict[str, Any], lamp_task: str, items: int, missing: list[str]
) -> dict[str, Any] | None:
    """The `compare` result when each few-shot user has so many items; the bank stays the same."""
    own = settings | {"split": settings["split"] | {"few_shot_items": items}}
    try:
        summary = result_of(run_lamp_task, own, lamp_task)
        compared = result_of(compare, own, lamp_task, summary["prepared"], summary["scores"])
    except StageFailed as error:
        missing.append(f"with {items} items: {error}")
        return None
    missing += [f"with {items} items: {line}" for line in summary["missing"]]
    return {"ref": compared["ref"], "intervals": compared["value"]["intervals"]}


def _map(title: str, own: dict[str, Any], missing: list[str]) -> dict[str, Any] | None:
    """The users' map; a picture that cannot be drawn costs no scores."""
    bank = own["bank"]["value"]["users"]
    try:
        found: dict[str, Any] = result_of(users_map, title, own["anchors"], bank)
    except StageFailed as error:
        missing.append(f"{title}: {error}")
        return None
    return found

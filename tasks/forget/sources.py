"""Where a user to forget came from: the files that runs were given, and the user's texts there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from tasks.config.run import RunConfig
from tasks.errors import InputError
from tasks.lamp.definitions import TASKS, LampTask
from tasks.lamp.download import FOLDERS, cache_folder
from tasks.lamp.folders import of_task
from tasks.lamp.formats import read_users


def in_sources(runs: Iterable[Any], user_id: str, data: Path | None) -> tuple[list[str], set[str]]:
    """The files of users that have the user, and all texts of the user there.

    runs: what the files of runs hold. data: files that no run may remember, of any LaMP task.
    Raises InputError where these cannot be read as users of any task.
    """
    places = {place for run in runs for place in _places(run)}
    if data is not None:
        places |= {(data, task, 0) for task in TASKS.values()}
    read, found, texts = set(), set(), set()
    for given, task, seed in places:
        try:
            place = of_task(given, task.name)
            users = read_users(place, task, seed).users
        except InputError:
            continue  # gone, or of another task
        read.add(given)
        for row in users.filter(pl.col("user_id") == user_id).to_dicts():
            texts |= {item["text"] for item in row["profile"]}
            texts |= {item["input"] for item in row["query"]}
            found.add(str(place))
    if data is not None and data not in read:
        raise InputError(f"--data {data}: cannot be read as users of any LaMP task; check the path")
    return sorted(found), texts


def _places(run: Any) -> Iterator[tuple[Path, LampTask, int]]:
    """Where a run's data lie, task by task, and each seed that decides how they are read."""
    try:
        config = RunConfig.model_validate(run["config"])
    except (ValueError, KeyError, TypeError):
        return  # of another version
    for name in config.lamp_tasks:
        if config.data == "lamp" and name in FOLDERS:
            lamp = config.lamp
            inside = f"time/{FOLDERS[name]}" if lamp.split == "time" else FOLDERS[name]
            yield cache_folder(lamp) / inside / lamp.part, config.definition(name), 0
        elif config.data not in ("lamp", "synthetic"):
            for seed in config.all_seeds if name == "LaMP-1" else [0]:
                yield Path(config.data).expanduser(), config.definition(name), seed

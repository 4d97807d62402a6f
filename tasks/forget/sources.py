"""Where a user to forget came from: the files that runs were given, and the user's texts there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.config import RunConfig
from tasks.errors import InputError
from tasks.store.artifacts import Store


def in_sources(
    where: Store, runs: list[dict[str, Any]], user_id: str, data: Path | None
) -> tuple[list[str], set[str]]:
    """The sources outside the store that have the user, and all texts of the user.

    runs: files of `.mta/runs`. data: a source that no run may remember, of any LaMP task.
    Raises InputError where `data` cannot be read as users of any task.
    """
    import polars as pl

    from tasks.lamp.definitions import TASKS, get_task
    from tasks.lamp.folders import of_task
    from tasks.lamp.formats import read_users

    places = set(_places(runs))
    if data is not None:
        places |= {(data, name, 0) for name in TASKS}
    worlds = where.root.glob("synthetic/*/*/users")
    inside = {(folder, name, 0) for folder in worlds for name in TASKS}
    found: set[str] = set()
    texts: set[str] = set()
    read = False
    for given, name, seed in sorted(places | inside):
        try:
            place = of_task(given, name)
            users = read_users(place, get_task(name), seed).users
        except InputError:
            continue  # gone, or of another task
        read = read or (given, name, seed) in places
        for row in users.filter(pl.col("user_id") == user_id).to_dicts():
            texts |= {item["text"] for item in row["profile"]}
            texts |= {item["input"] for item in row["query"]}
            if (given, name, seed) in places:
                found.add(str(place))
    if data is not None and not read:
        raise InputError(f"--data {data}: cannot be read as users of any LaMP task; check the path")
    if (
        any(run.get("config", {}).get("data") == "synthetic" for run in runs)
        and texts
        and not found
    ):
        found.add("data=synthetic (generated, no person)")
    return sorted(found), {text for text in texts if text.strip()}


def _places(runs: list[dict[str, Any]]) -> Iterator[tuple[Path, str, int]]:
    """Where the runs' data lie, task by task, and each seed that decides how they are read."""
    from tasks.lamp.download.site import FOLDERS, cache_folder

    for run in runs:
        try:
            options = RunConfig.model_validate(run.get("config", {}))
        except ValueError:
            continue  # of an earlier version
        for name in options.lamp_tasks:
            if options.data == "lamp" and name in FOLDERS:
                lamp = options.lamp
                inside = f"time/{FOLDERS[name]}" if lamp.split == "time" else FOLDERS[name]
                yield cache_folder(lamp) / inside / lamp.part, name, 0
            elif options.data not in ("lamp", "synthetic"):
                for seed in options.all_seeds if name == "LaMP-1" else [0]:
                    yield Path(options.data).expanduser(), name, seed

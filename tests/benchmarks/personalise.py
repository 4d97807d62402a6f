"""One new user, on demand: seconds from a history to a PEFT folder, with a finished run.

    mta run -p 'lamp_tasks=["LaMP-2M"]' -p 'items_curve=[]' -p 'methods=["base", "mta"]'
    python -m tests.benchmarks.personalise                    of the last run, its first LaMP task
    python -m tests.benchmarks.personalise --run NAME --users 256 --repetitions 20

Users are generated, of a world that the run did not see; each has `--items` items. Medians:

* `cold_seconds`: `mta personalise` for one user, the whole process; `load_seconds`: loading the run
  in a process that has the libraries;
* `warm_ms`: one user, when it is loaded, to the folder written; `memory_ms`: to the LoRA in memory;
  `recipe_ms`: to recipe and merged LoRA, without the stacked one; `..._cpu_ms`: of processor time,
  which other work on the machine lengthens less;
* `users_per_second`: `--users` users in groups of 64, to LoRAs in memory.

`load_average`: of other work and this, in the last minute. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from tasks.lamp.formats import read_histories
from tasks.lamp.options import SyntheticOptions
from tasks.lamp.synthetic import World
from tasks.personalise.new_users import as_user, write
from tasks.personalise.personaliser import Personaliser
from tasks.report.files import read_run
from tasks.text.questions import User

GROUP = 64
# Of the world of the users: no benchmark has it.
SEED = 4_000_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="last")
    parser.add_argument("--users", type=int, default=256)
    parser.add_argument("--items", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measured(given, Path(scratch))))


def measured(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All figures, rounded."""
    run = read_run(given.run)
    cell = run.cells[0]
    records = people(cell.config.lamp_task, given.users, given.items, scratch)
    file = scratch / "user.json"
    file.write_text(json.dumps(records[0]))
    cold = [cold_seconds(run.id, file, scratch / f"cold-{n}") for n in range(3)]
    started = time.perf_counter()
    personaliser = Personaliser(cell)
    loading = time.perf_counter() - started
    file.write_text(json.dumps(records))
    users = [as_user(one) for one in read_histories(file, cell.config.task)]
    few = users[: given.repetitions]
    personaliser(users[:1])

    def folder(user: User) -> None:
        (made,) = personaliser([user])
        write(scratch / f"warm-{user['user_id']}", made, personaliser, "folder")

    ways: dict[str, Callable[[User], Any]] = {
        "warm": folder,
        "memory": lambda one: personaliser([one]),
        "recipe": lambda one: personaliser([one], train=False),
    }
    one_user = {name: value for way, call in ways.items() for name, value in each(way, call, few)}
    started = time.perf_counter()
    for start in range(0, len(users), GROUP):
        personaliser(users[start : start + GROUP])
    whole = time.perf_counter() - started
    return {
        "cold_seconds": round(statistics.median(cold), 2),
        "load_seconds": round(loading, 2),
        **one_user,
        "users": len(users),
        "users_per_second": round(len(users) / whole, 1),
        "items": given.items,
        "anchors": len(personaliser.bank.ids),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def people(lamp_task: str, count: int, items: int, scratch: Path) -> list[dict[str, Any]]:
    """Users of a world of their own, as a user file has them, without queries."""
    options = SyntheticOptions(few_shot_users=count, few_shot_items=items, queries=1)
    World(lamp_task, options, SEED).write(scratch / "world")
    made = json.loads((scratch / "world" / "user_few_shot.json").read_text())
    return [{"user_id": f"new-{n}", "profile": one["profile"]} for n, one in enumerate(made)]


def cold_seconds(run: str, file: Path, to: Path) -> float:
    """One user by the command, in a process of its own."""
    command = [sys.executable, "-m", "tasks.tools.main", "personalise", "--run", run]
    started = time.perf_counter()
    subprocess.run([*command, "--user", str(file), "--to", str(to)], check=True, stdout=sys.stderr)
    return time.perf_counter() - started


def each(
    name: str, call: Callable[[User], Any], users: Iterable[User]
) -> Iterator[tuple[str, float]]:
    """The median milliseconds of a call: by the clock, and of this process's processor time."""
    seconds = []
    for user in users:
        began = time.perf_counter(), time.process_time()
        call(user)
        seconds.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    for kind, values in zip(("ms", "cpu_ms"), zip(*seconds, strict=True), strict=True):
        yield f"{name}_{kind}", round(1000 * statistics.median(values), 1)


if __name__ == "__main__":
    main()

"""Remove a user, and all that was made of the user's texts, and prove it by a search."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from tasks.bank import META
from tasks.config.run import RunConfig
from tasks.errors import InputError, label
from tasks.forget.closure import Going, Marks, has_mark, marks_of, stage_of, what_goes
from tasks.forget.servers import Sought, forget_in_prefect, traces_in_mlflow
from tasks.lamp.definitions import TASKS, LampTask
from tasks.lamp.download import FOLDERS, cache_folder, site_folder
from tasks.lamp.folders import of_task
from tasks.lamp.formats import read_users
from tasks.report.files import REPORT_FILE, REPORTS_FOLDER, RUNS_FOLDER, TABLE_FILE
from tasks.results.store import CHECKPOINTS, Store
from tasks.tracking.server import mlflow_uris


def forget(store: Store, user_id: str, data: Path | None = None) -> tuple[list[str], list[str]]:
    """Forget a user; (what was done, what is left), in lines.

    Raises InputError where nothing knows the user, or a run is under way.
    """
    store.sweep()
    if working := store.working():
        raise InputError(f"store: {working[0]} is held by a run; let it end, and call again")
    store.fetch_all()
    uris = mlflow_uris(store.state)
    runs = {file: _json(file) for file in _beside(store, f"{RUNS_FOLDER}/*.json")}
    sources, texts = in_sources(runs.values(), user_id, data)
    marks = marks_of(store, user_id, texts)
    going = what_goes(store, marks)
    anchors, in_store = _anchors(store, going, marks), bool(going.folders or going.files)
    trained = going.base_model or bool(anchors)
    named = {file: run for file, run in runs.items() if in_store and going.named_in(run, marks)}
    flow_runs = {file.stem for file in named}
    taught = flow_runs if trained else set()
    sought = Sought(marks, anchors | marks.ids, taught, going.learned)
    in_mlflow = traces_in_mlflow(uris, sought, remove=True)
    if not (in_store or in_mlflow.runs or sources):
        raise InputError(f"{label(user_id)}: no such user in {store.root}, MLflow or known data")
    # Beside the store; `mta run` makes it where it is called.
    homes = dict.fromkeys(home.absolute() for home in (store.state / "local", Path(".mta/local")))
    done, left = forget_in_prefect(flow_runs | in_mlflow.flow_runs, homes)
    if in_mlflow.runs:
        done.append(f"MLflow: removed from {in_mlflow.runs} runs")
    if in_store or in_mlflow.runs:
        done.append(_forget_beside(store, named, marks))
        done += _remove(store, going)
    if trained:
        names = [f"anchor {label(one)}" for one in sorted(anchors)]
        names = ["the base model", *names] if going.base_model else names
        done.append(f"trained on the user, so removed and trained again: {', '.join(names)}")
    searched, holding = search(store, marks)
    again = traces_in_mlflow(uris, Sought(marks, learned=going.learned))
    left = list(dict.fromkeys([*in_mlflow.failed, *left, *holding, *again.failed, *again.lines]))
    what = f"{len(left)} left" if left else "nothing of the user is left"
    done.append(f"proof: searched {searched} files of the store and beside it, and MLflow: {what}")
    done += [f"{source}: still holds the user, who comes back with it" for source in sources]
    return done, left


def _anchors(store: Store, going: Going, marks: Marks) -> set[str]:
    """The anchors whose LoRAs go, as they were trained on the user: all, if the base model was.

    The LoRA below all of group_experts was trained on base users' items.
    """
    base = going.base_model
    anchors, every = set[str](), {"meta_lora": base, "experts": base or bool(going.taught)}
    for uri in going.folders:
        place, stage = store.root / uri, stage_of(uri)
        # Beside members' folders is one of their bank.
        if stage not in every or (place / "members.json").exists():
            continue
        if every[stage] or has_mark(place, marks):
            # By its uri where its name cannot be read.
            anchors.add(str((_json(place / META) or {"anchor": uri})["anchor"]))
    return anchors


def in_sources(runs: Iterable[Any], user_id: str, data: Path | None) -> tuple[list[str], set[str]]:
    """The files of users that have the user, and all texts of the user there.

    runs: what the files of runs hold. data: files that no run may remember, of any LaMP task.
    Raises InputError where these cannot be read as users of any task.
    """
    places = {place for run in runs for place in _places(run)}
    if data is not None:
        places |= {(data, task, 0) for task in TASKS.values()}
    readable, holding, texts = set[Path](), set[str](), set[str]()
    for source, task, seed in places:
        try:
            file = of_task(source, task.name)
            users = read_users(file, task, seed).users
        except InputError:
            continue  # gone, or of another task
        readable.add(source)
        for row in users.filter(pl.col("user_id") == user_id).to_dicts():
            texts |= {item["text"] for item in row["profile"]}
            texts |= {item["input"] for item in row["query"]}
            holding.add(str(file))
    if data is not None and data not in readable:
        raise InputError(f"--data {data}: cannot be read as users of any LaMP task; check the path")
    return sorted(holding), texts


def _places(run: Any) -> Iterator[tuple[Path, LampTask, int]]:
    """Where a run's data lie, task by task, and each seed that decides how they are read."""
    try:
        config = RunConfig.model_validate(run["config"])
    except (ValueError, KeyError, TypeError):
        return  # of another version
    for name in config.lamp_tasks:
        if config.data == "lamp" and name in FOLDERS:
            place = cache_folder(config.lamp) / site_folder(name, config.lamp)
            yield place / config.lamp.part, config.definition(name), 0
        elif config.data not in ("lamp", "synthetic"):
            for seed in config.all_seeds if name == "LaMP-1" else [0]:
                yield Path(config.data).expanduser(), config.definition(name), seed


def search(store: Store, marks: Marks) -> tuple[int, list[str]]:
    """How many files were searched, and those that hold a mark or cannot be read."""
    store.fetch_all()
    beside = (REPORT_FILE, TABLE_FILE, f"{CHECKPOINTS}/*/*", f"{RUNS_FOLDER}/*",
              f"{REPORTS_FOLDER}/*", "logs/*.log")  # fmt: skip
    files = [*sorted(store.root.rglob("*")), *_beside(store, *beside)]
    files = [file for file in files if file.is_file()]
    return len(files), [
        f"{file}: holds the user, or cannot be read" for file in files if has_mark(file, marks)
    ]


def _beside(store: Store, *patterns: str) -> list[Path]:
    return sorted(file for pattern in patterns for file in store.state.glob(pattern))


def _json(file: Path) -> Any:
    """What a file holds; None where it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _remove(store: Store, going: Going) -> list[str]:
    """Remove what goes; lines of what was removed.

    Tables of users go last: a call that was cut off is made again, and looks the user up there. By
    then no result points to what lost its own. Trainings that were cut off may be of the user, or
    go on from what goes: all begin anew.
    """
    cut_off = [file for file in store.checkpoints.rglob("*") if file.is_file()]
    for file in cut_off:
        file.unlink()
    for file in going.files:
        store.remove(file)
    for uri in sorted(going.folders, key=lambda uri: (stage_of(uri) == "prepare", uri)):
        store.remove(store.root / uri)
    counts = sorted(Counter(map(stage_of, going.folders)).items())
    lines = [f"store: {stage}: {count} folders removed" for stage, count in counts]
    return lines + ([f"checkpoints removed: {len(cut_off)}"] if cut_off else [])


def _forget_beside(store: Store, runs: dict[Path, Any], marks: Marks) -> str:
    """Remove runs and what they showed; cross out ids in logs, which servers go on writing."""
    names = {run.get("report") for run in runs.values() if run}
    reports = _beside(store, f"{REPORTS_FOLDER}/*")
    removed = [*runs, *(file for file in reports if file.stem in names or has_mark(file, marks))]
    for file in removed:
        file.unlink()
    for link in (store.state / REPORT_FILE, store.state / TABLE_FILE):
        if not link.exists():
            link.unlink(missing_ok=True)  # it led to a report that is gone
    crossed = sum(_cross_out(file, marks) for file in _beside(store, "logs/*.log"))
    return f"beside the store: {len(removed)} files removed, {crossed} mentions in logs x-ed out"


def _cross_out(file: Path, marks: Marks) -> int:
    """Ids in a log become x's of the same length, in place: it may be open for appending."""
    ids = re.compile(marks.words.pattern.encode())
    crossed, count = ids.subn(lambda match: b"x" * len(match.group()), file.read_bytes())
    with file.open("r+b") as opened:
        opened.write(crossed)
    return count

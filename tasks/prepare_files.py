"""The files that the `prepare` stage reads: which they are, and their hashes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from tasks.config import RunConfig
from tasks.lamp.folders import of_task
from tasks.running.progress import Progress
from tasks.stage import log
from tasks.store.artifacts import Store
from tasks.store.pieces import digest, known_sha256, library_versions

VERSION = 8
MEGABYTE = 10**6


def hashes(folder: Path) -> dict[str, str]:
    """Name -> sha256 of the files of users in a folder, or of the one file that is given."""
    # Per-Pcs and MTA keep their few-shot users in a folder of their own.
    files = [folder]
    if folder.is_dir():
        patterns = ("*.json", "*.jsonl", "test_100/*.json", "test_100/*.jsonl")
        files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    return {str(file.relative_to(folder)): known_sha256(file) for file in files if file.exists()}


def ratings(options: RunConfig, lamp_task: str) -> dict[str, str]:
    """How ratings are read, for the key: "4.0" was none once. Generated worlds have only "4"."""
    return {"ratings": "float"} if lamp_task == "LaMP-3" and options.data != "synthetic" else {}


def source(options: RunConfig, lamp_task: str, where: Store) -> Path:
    """The file or folder the users are read from; the synthetic one is written first."""
    if options.data == "lamp":
        return _official(options, lamp_task)
    if options.data != "synthetic":
        return of_task(Path(options.data).expanduser(), lamp_task)
    from tasks.lamp.synthetic import write_synthetic

    key = digest(
        {
            "version": VERSION,
            "libraries": library_versions(("numpy",)),
            "lamp_task": lamp_task,
            "synthetic": options.synthetic.model_dump(),
            "seed": options.seed,
        }
    )

    def write(out: Path) -> dict[str, Any]:
        write_synthetic(out / "users", lamp_task, options.synthetic, options.seed)
        return {}

    return where.get("synthetic", key, write).folder / "users"


def _official(options: RunConfig, lamp_task: str) -> Path:
    """The folder of the benchmark's own files, downloaded where they are not in the cache."""
    from tasks.lamp.download import official_files

    bars: dict[str, Progress] = {}

    def show(name: str, done: int, total: int | None) -> None:
        # Where the server does not say how much comes, there is always one more.
        come = math.ceil(done / MEGABYTE)
        whole = come + 1 if total is None else math.ceil(total / MEGABYTE)
        if name not in bars:
            key = re.sub("[^a-z0-9]+", "-", f"download-{lamp_task}-{name}".lower())
            bars[name] = Progress(key, f"{lamp_task}: MB of {name}", whole)
        bars[name].update(come, whole)

    return official_files(lamp_task, options.lamp, log, show)

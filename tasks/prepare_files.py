"""The files that the `prepare` stage reads: which they are, and their hashes."""

from __future__ import annotations

import math
import re
from pathlib import Path

from tasks.config.task import TaskConfig
from tasks.files import file_sha256
from tasks.lamp.folders import of_task
from tasks.lamp.options import SyntheticOptions
from tasks.log import log
from tasks.results.models import Given
from tasks.running.progress import Progress

MEGABYTE = 10**6


def hashes(folder: Path) -> dict[str, str]:
    """Name -> sha256 of the files of users in a folder, or of the one file that is given."""
    # Per-Pcs and MTA keep their few-shot users in a folder of their own.
    files = [folder]
    if folder.is_dir():
        patterns = ("*.json", "*.jsonl", "test_100/*.json", "test_100/*.jsonl")
        files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    return {str(file.relative_to(folder)): file_sha256(file) for file in files if file.exists()}


def source(config: TaskConfig) -> Given | SyntheticOptions:
    """The files that the users are read from, or the world that is generated."""
    if config.data == "synthetic":
        return config.synthetic
    if config.data == "lamp":
        place = _official(config)
    else:
        place = of_task(Path(config.data).expanduser(), config.lamp_task)
    return Given(path=str(place.absolute()), files=hashes(place))


def _official(config: TaskConfig) -> Path:
    """The folder of the benchmark's own files, downloaded where they are not in the cache."""
    from tasks.lamp.download import official_files

    lamp_task = config.lamp_task
    bars: dict[str, Progress] = {}

    def show(name: str, done: int, total: int | None) -> None:
        # Where the server does not say how much comes, there is always one more.
        come = math.ceil(done / MEGABYTE)
        whole = come + 1 if total is None else math.ceil(total / MEGABYTE)
        if name not in bars:
            key = re.sub("[^a-z0-9]+", "-", f"download-{lamp_task}-{name}".lower())
            bars[name] = Progress(key, f"{lamp_task}: MB of {name}", whole)
        bars[name].update(come, whole)

    return official_files(lamp_task, config.lamp, log, show)

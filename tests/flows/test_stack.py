"""The local stack in a folder of its own: run by deployment, kill the worker, start again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import records
from tests.small import SMALL

ROOT = Path(__file__).resolve().parents[2]
# What another process compiles just now.
HALF_COMPILED = shutil.ignore_patterns("*.pyc.*")
COUNT = 5
SECTIONS: dict[str, Any] = SMALL | {
    # Long enough, anchor by anchor, to be killed in the middle.
    "anchors": SMALL["anchors"] | {"count": COUNT},
    "meta_lora": {"rank": 2, "alpha": 4.0, "epochs": 20, "batch_size": 1},
}


def environment() -> dict[str, str]:
    """That of a shell with the environment active and nothing else set."""
    bin_folder = str(Path(sys.executable).parent)
    # The make that may run these tests hands its own flags and variables on.
    other = ("PREFECT_", "MLFLOW_", "MTA_", "MAKE", "MFLAGS")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(other)}
    return kept | {"PATH": f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}"}


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A copy of the project with a stack of its own, ended afterwards."""
    folder = tmp_path / "project"
    copy_project(folder)
    try:
        yield folder
    finally:
        stack(folder, "down")


def copy_project(folder: Path) -> None:
    """The project's code in a folder of its own; as it was compiled, where it was."""
    for name in ("flows", "tasks", "infra"):
        shutil.copytree(ROOT / name, folder / name, ignore=HALF_COMPILED)
    shutil.copy(ROOT / "prefect.yaml", folder)


def stack(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "infra.local", *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def parameters() -> list[str]:
    return [part for k, v in SECTIONS.items() for part in ("-p", f"{k}={json.dumps(v)}")]


@pytest.mark.slow
def test_a_killed_worker_costs_only_the_anchor_in_hand(project: Path) -> None:
    up = stack(project, "up")
    assert up.returncode == 0, up.stderr
    # The second shell: the address comes from the project's own Prefect settings.
    started = subprocess.run(
        ["prefect", "deployment", "run", "mta/full-benchmark", *parameters()],
        cwd=project,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert started.returncode == 0, started.stdout + started.stderr
    deadline = time.monotonic() + 600
    while len(records(project, "meta_lora")) < 2:
        assert time.monotonic() < deadline, (project / ".mta/logs/worker.log").read_text()[-3000:]
        time.sleep(0.05)
    worker = json.loads((project / ".mta/run/worker.json").read_text())["pid"]
    os.kill(worker, signal.SIGKILL)
    again = stack(project, "up")
    assert again.returncode == 0, again.stderr
    assert "CRASHED" in again.stderr
    finished = records(project, "meta_lora")
    assert 2 <= len(finished) < COUNT
    run = stack(project, "benchmark", *parameters())
    assert run.returncode == 0, run.stdout + run.stderr
    assert "merge_only" in run.stdout
    after = records(project, "meta_lora")
    assert len(after) == COUNT
    # A record holds how long the work took, to the millisecond: made again it would differ.
    assert {key: after[key] for key in finished} == finished

    # Bad input through the deployment: one line, and the exit code is not 0.
    bad = stack(project, "benchmark", "-p", "data=nowhere.json")
    assert bad.returncode != 0
    assert "nowhere.json: there is no such file or folder" in bad.stderr
    assert "Traceback" not in bad.stdout + bad.stderr

"""What a killed `mta run` leaves behind, and what becomes of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.local.alone import OWNER, end_orphans

ROOT = Path(__file__).resolve().parents[2]
# Holds the slot, says so, and waits to be killed.
HOLDER = """
import sys, time
from pathlib import Path
from infra.local.alone import local_server
from prefect import flow, task
from tasks.running.slots import gpu_slot, gpu_slots

@task
def waits():
    with gpu_slot():
        print("held", flush=True)
        time.sleep(600)

@flow
def holds():
    gpu_slots()
    waits()

with local_server(Path(sys.argv[1])):
    holds()
"""
# A run after it: which runs there are, and whether the slot is to be had.
NEXT = """
import sys, time
from pathlib import Path
from infra.local.alone import local_server
from prefect import task
from prefect.client.orchestration import get_client
from tasks.running.slots import gpu_slot

@task
def takes():
    with gpu_slot():
        print("held", flush=True)
        time.sleep(600)

with local_server(Path(sys.argv[1])), get_client(sync_client=True) as client:
    print(*(run.state.name for run in client.read_flow_runs()), flush=True)
    takes()
"""


def start(code: str, home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(home)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")},
    )  # fmt: skip


def held(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n", process.communicate()
    (server,) = psutil.Process(process.pid).children()
    return server


@pytest.mark.slow
@pytest.mark.server
def test_what_follows_a_kill(tmp_path: Path, prefect_tables: Path) -> None:
    """Of a run: the next one ends its server, says so of it, and gets its slot. Of that one's
    server: it ends at once, with one line."""
    shutil.copy(prefect_tables, tmp_path / "prefect.db")
    first = start(HOLDER, tmp_path)
    server = held(first)
    first.send_signal(signal.SIGKILL)
    first.wait()  # not for its pipes' end: its server has them
    assert server.is_running()
    second = start(NEXT, tmp_path)
    assert second.stdout is not None
    assert second.stdout.readline() == "Crashed\n"
    own = held(second)
    assert not server.is_running()
    own.kill()
    _, err = second.communicate(timeout=300)
    assert second.returncode == 1
    assert "start the run again" in err.splitlines()[-1]


SLEEP = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"]


def sleeper(home: Path, **variables: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PREFECT_HOME": str(home), **variables}
    process = subprocess.Popen(SLEEP, env=env, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_the_server_of_another_run_is_left(tmp_path: Path) -> None:
    with sleeper(tmp_path, **{OWNER: str(os.getpid())}) as mine:
        assert not end_orphans(tmp_path)
        assert end_orphans(tmp_path / "elsewhere")
        assert mine.poll() is None
        mine.kill()


def test_a_worker_of_a_killed_run_ends_and_a_strangers_process_does_not(tmp_path: Path) -> None:
    """A worker process that still imports does not notice the end of its run."""
    gone = subprocess.Popen(SLEEP)
    gone.kill()
    gone.wait()
    with sleeper(tmp_path, **{OWNER: str(gone.pid)}) as worker, sleeper(tmp_path) as stranger:
        assert end_orphans(tmp_path)
        worker.wait(300)
        assert stranger.poll() is None
        stranger.kill()

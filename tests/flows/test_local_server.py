"""What a killed `mta run` leaves behind, and what becomes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.local.alone import OWNER, end_orphans

ROOT = Path(__file__).resolve().parents[2]
# Holds the slot, says so, and waits to be killed, or for its server to be.
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
# A run after it: which runs are under way, and whether the slot is to be had.
NEXT = """
import sys
from pathlib import Path
from infra.local.alone import local_server
from prefect import task
from prefect.client.orchestration import get_client
from tasks.running.slots import gpu_slot

@task
def takes():
    with gpu_slot():
        print("held")

with local_server(Path(sys.argv[1])), get_client(sync_client=True) as client:
    print(*(run.state.name for run in client.read_flow_runs()))
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
def test_after_a_killed_run_its_server_ends_and_its_slot_is_free(tmp_path: Path) -> None:
    first = start(HOLDER, tmp_path)
    server = held(first)
    first.send_signal(signal.SIGKILL)
    first.wait()  # not for its pipes' end: its server has them
    assert server.is_running()
    second = start(NEXT, tmp_path)
    out, err = second.communicate(timeout=120)
    assert out.split() == ["Crashed", "held"], err
    assert not server.is_running()


@pytest.mark.slow
@pytest.mark.server
def test_a_run_whose_server_was_killed_ends_with_one_line(tmp_path: Path) -> None:
    run = start(HOLDER, tmp_path)
    held(run).kill()
    _, err = run.communicate(timeout=20)
    assert run.returncode == 1
    assert "start the run again" in err.splitlines()[-1]


SLEEP = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"]


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
        worker.wait(5)
        assert stranger.poll() is None
        stranger.kill()

"""Worker processes: one that is killed costs its job a second try, and none outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import psutil
import pytest
from prefect.task_runners import ThreadPoolTaskRunner

import tasks.running.pool as pool
from tasks.running.pool import TRIES, SharedProcesses, SharedThreads, Workers, end_with_parent
from tasks.stage import StageFailed


def make() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


@pytest.fixture
def workers() -> Iterator[Workers]:
    pool = Workers(1, make)
    yield pool
    pool.shutdown()


def die_until(marks: Path, times: int) -> str:
    """End this process, as the kernel does when memory runs out, so many times."""
    (marks / str(time.monotonic_ns())).touch()
    if len(list(marks.iterdir())) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def test_a_job_whose_process_is_killed_gets_another(workers: Workers, tmp_path: Path) -> None:
    assert workers.submit(partial(die_until, tmp_path, 1)).result() == "done"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_job_that_always_ends_its_process_fails_and_the_next_runs(
    workers: Workers, tmp_path: Path
) -> None:
    with pytest.raises(BrokenProcessPool):
        workers.submit(partial(die_until, tmp_path, 99)).result()
    assert len(list(tmp_path.iterdir())) == TRIES
    assert workers.submit(os.getpid).result() != os.getpid()


def given_up(marks: Path, times: int) -> str:
    """End so many times as Prefect does a job that it could not begin."""
    (marks / str(time.monotonic_ns())).touch()
    if len(list(marks.iterdir())) <= times:
        sys.exit(1)
    return "done"


def test_a_job_that_could_not_begin_is_tried_again(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SystemExit that got through would leave whoever waits for the job waiting for ever."""
    monkeypatch.setattr(pool, "PAUSES", (0.01,) * 3)
    assert workers.submit(partial(given_up, tmp_path, 1)).result(60) == "done"
    with pytest.raises(BrokenProcessPool, match="server did not answer"):
        workers.submit(partial(given_up, tmp_path, 99)).result(60)
    assert len(list(tmp_path.iterdir())) == 2 + TRIES


def test_after_kill_no_job_is_taken() -> None:
    """Other LaMP tasks of the run may still hand some in."""
    for runner in (SharedThreads(max_workers=1), SharedProcesses(max_workers=1)):
        with runner:
            runner.kill()
            with pytest.raises(StageFailed, match="the run has ended"):
                runner.submit(None, {})  # type: ignore[arg-type]


def test_jobs_share_one_process(workers: Workers) -> None:
    # A loaded model is kept by its process.
    assert workers.submit(os.getpid).result() == workers.submit(os.getpid).result()


def test_after_kill_the_job_fails_and_no_process_starts(workers: Workers) -> None:
    process = psutil.Process(workers.submit(os.getpid).result())
    job = workers.submit(partial(time.sleep, 600))
    # The kill is only of use once the job is under way.
    threading.Timer(0.5, workers.kill).start()
    with pytest.raises(BrokenProcessPool):
        job.result(60)
    psutil.wait_procs([process], timeout=10)
    assert not process.is_running()
    with pytest.raises(BrokenProcessPool):
        workers.submit(os.getpid).result(60)


# Starts a worker that works for ten minutes, and says its pid.
PARENT = """
import multiprocessing, sys, time
from tests.unit.running.test_pool import announce_and_sleep
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=announce_and_sleep).start()
    time.sleep(600)
"""


def announce_and_sleep() -> None:
    end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(600)


def test_a_worker_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(root)},
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("shared", [SharedThreads, SharedProcesses])
def test_one_runner_for_a_flow_and_its_sub_flows(
    shared: type[SharedThreads | SharedProcesses],
) -> None:
    runner = shared(max_workers=1)
    assert runner.duplicate() is runner
    with runner:
        opened = runner._executor
        assert opened is not None
        with runner.duplicate():
            assert runner._executor is opened
        assert runner._executor is opened
    assert runner._executor is None


def test_a_job_does_not_carry_its_pool() -> None:
    assert isinstance(pickle.loads(pickle.dumps(SharedThreads(4))), ThreadPoolTaskRunner)

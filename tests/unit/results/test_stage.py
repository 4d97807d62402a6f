"""Stages outside a flow: plain functions with a key. What Prefect does is in tests/flows."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.states import Failed

from tasks.errors import DiskFull, InputError
from tasks.fusion import fusion
from tasks.record import File, Result, library_versions
from tasks.results import stage as stage_module
from tasks.results.stage import Stage, StageFailed, stage
from tasks.results.store import Store, store


class Made(Result):
    number: int
    file: File | None = None


@stage(version=3, libraries=("pydantic",))
def demo(number: int, file: File | None = None, *, times: int = 1) -> Made:
    """What it does."""
    if number < 0:
        raise InputError(f"number {number}: must not be negative")
    with store().new("demo") as folder:
        (folder.path / "file").write_text(str(number * times))
    return Made(number=number * times, file=folder.file("file"))


def test_a_call_is_the_function(where: Store) -> None:
    given = File(uri="prepare/ab/abc/file", sha256="1" * 64)
    made = demo(5, given, times=2)
    assert (made.number, made.cached) == (10, False)
    assert made.file
    assert where.path(made.file).read_text() == "10"
    assert made.made_of == ("prepare/ab/abc",)
    assert made.seconds > 0
    assert demo.submit(number=5, times=2).result().number == 10
    assert (demo.name, demo.__doc__, demo.__module__) == ("demo", "What it does.", __name__)


def test_an_error_is_as_it_was_raised(where: Store) -> None:
    with pytest.raises(InputError, match="number -1: must not be negative"):
        demo(-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'another'"):
        demo(1, another=2)  # type: ignore[call-arg]


def test_a_key_is_of_the_arguments_however_they_are_given() -> None:
    key = demo.key(5)
    assert key == demo.key(number=5) == demo.key(5, None, times=1)
    name, _, digest = key.partition("-")
    assert (name, len(digest)) == ("demo", 64)
    assert len({key, demo.key(6), demo.key(5, times=2)}) == 3


def test_a_key_is_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name, its version and its libraries with their versions; not what it does."""

    def key(
        name: str = "demo", version: int = 3, libraries: tuple[str, ...] = ("pydantic",)
    ) -> str:
        def other(number: int, file: File | None = None, *, times: int = 1) -> Made:
            raise AssertionError

        other.__name__ = name
        made: Stage[..., Made] = stage(version=version, libraries=libraries)(other)
        return made.key(5)

    assert key() == demo.key(5)
    others = {key(name="other"), key(version=4), key(libraries=()), key(libraries=("prefect",))}
    assert len({demo.key(5), *others}) == 5
    assert demo.identity == ["demo", 3, library_versions(("pydantic",))]
    before = demo.key(5)
    monkeypatch.setattr("tasks.results.stage.library_versions", lambda _names: {"pydantic": "0"})
    assert demo.key(5) != before


def test_a_stage_travels_by_its_name() -> None:
    """In another process it is what stands in the module there, with its decorator."""
    assert pickle.loads(pickle.dumps(demo)) is demo
    assert pickle.loads(pickle.dumps(fusion)) is fusion
    assert len(pickle.dumps(fusion)) < 200


def test_why_a_run_gave_nothing_is_one_short_line() -> None:
    def said(error: Exception | None, message: str | None) -> str:
        found = stage_module._failure(Failed(data=error, message=message), "demo")
        assert type(found) is StageFailed
        assert isinstance(found, InputError)
        return str(found)

    assert said(InputError("file x: record 3 has no tag"), "other") == "file x: record 3 has no tag"
    raised = "Task run encountered an exception KeyError: 1\n  in a file"
    assert said(KeyError(1), raised) == "demo: KeyError: 1 in a file"
    assert said(None, "http://me:secret@host") == "demo: http://***@host"
    assert len(said(ValueError(), "y" * 9999)) == 506
    assert said(ValueError(), None) == "demo: Failed"


def test_a_run_without_disk_ends_as_such() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/x")
    found = stage_module._failure(Failed(data=error), "demo")
    assert type(found) is DiskFull
    assert str(found).startswith("disk full: [Errno 28] No space left on device: '/x'; make")


def test_what_may_pass_is_tried_again() -> None:
    may_pass: Any = stage_module._may_pass
    assert may_pass(None, None, Failed(data=ConnectionError()))
    assert not may_pass(None, None, Failed(data=ValueError()))
    assert not may_pass(None, None, Failed(data=InputError("file x: record 3 has no tag")))
    assert not may_pass(None, None, Failed(message="file x: record 3 has no tag"))


# Only the worker imports what it runs.
PARENT = """
import multiprocessing, time
if __name__ == "__main__":
    code = "from tests.unit.results.test_stage import announce_and_sleep; announce_and_sleep()"
    multiprocessing.get_context("spawn").Process(target=exec, args=(code,)).start()
    time.sleep(600)
"""


def announce_and_sleep() -> None:
    """Be a worker that works for ten minutes, and say its pid."""
    import time

    @stage(version=1)
    def sleeps() -> Made:
        print(os.getpid(), flush=True)
        time.sleep(600)
        return Made(number=0)

    sleeps()


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
    psutil.wait_procs([worker], timeout=300)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE

"""Locks of cache keys: of threads, of processes, of one that is killed."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect.locking.protocol import LockManager

from tasks.results.lock import FileLocks
from tasks.results.store import LOCKS, Store

KEY = "fusion-0123"
# A process that says when it holds the lock, and lets it go when it is told.
HOLDER = """
import sys
from tasks.results.lock import FileLocks
locks = FileLocks()
assert locks.acquire_lock(sys.argv[1], "holder")
print("held", flush=True)
sys.stdin.readline()
locks.release_lock(sys.argv[1], "holder")
"""


@pytest.fixture
def started() -> Iterator[Callable[[], subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, KEY]
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(command, stdout=pipe, stdin=pipe, text=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def held(process: subprocess.Popen[str]) -> bool:
    """Wait until the process holds the lock."""
    assert process.stdout
    return process.stdout.readline() == "held\n"


def test_it_is_prefects_protocol() -> None:
    assert isinstance(FileLocks(), LockManager)


def test_one_holder_at_a_time(where: Store) -> None:
    locks = FileLocks()
    assert not locks.is_locked(KEY)
    assert locks.acquire_lock(KEY, "one")
    assert locks.acquire_lock(KEY, "one")  # whoever holds it may ask again
    assert locks.is_lock_holder(KEY, "one")
    assert not locks.is_lock_holder(KEY, "two")
    assert locks.is_locked(KEY)
    before = time.monotonic()
    assert not locks.acquire_lock(KEY, "two", acquire_timeout=0.3)
    assert not locks.wait_for_lock(KEY, timeout=0.3)
    assert time.monotonic() - before >= 0.6
    assert where.working() == [where.root / LOCKS / f"{KEY}.lock"]
    # Other work is no hindrance.
    assert locks.acquire_lock("fusion-4567", "two", acquire_timeout=0)
    locks.release_lock("fusion-4567", "two")
    with pytest.raises(ValueError, match=f"two does not hold the lock of {KEY}"):
        locks.release_lock(KEY, "two")
    locks.release_lock(KEY, "one")
    assert not locks.is_locked(KEY)
    assert locks.wait_for_lock(KEY, timeout=0)
    assert where.working() == []
    with pytest.raises(ValueError, match="does not hold"):
        locks.release_lock(KEY, "one")


def test_two_managers_are_one_lock(where: Store) -> None:
    """Each task run of Prefect has a manager of its own."""
    assert FileLocks().acquire_lock(KEY, "one")
    assert FileLocks().is_lock_holder(KEY, "one")
    assert not FileLocks().acquire_lock(KEY, "two", acquire_timeout=0)
    FileLocks().release_lock(KEY, "one")


def test_the_same_from_async_code(where: Store) -> None:
    async def use() -> list[bool]:
        locks = FileLocks()
        first = await locks.aacquire_lock(KEY, "one")
        second = await locks.aacquire_lock(KEY, "two", acquire_timeout=0)
        waited = await locks.await_for_lock(KEY, timeout=0)
        locks.release_lock(KEY, "one")
        return [first, second, waited, await locks.await_for_lock(KEY, timeout=0)]

    assert asyncio.run(use()) == [True, False, False, True]


def test_two_waiters_have_it_one_after_the_other(where: Store) -> None:
    """Nobody is let in while another is inside, and all come in."""
    locks, inside, most = FileLocks(), [0], [0]
    came: list[str] = []
    assert locks.acquire_lock(KEY, "holder")

    def work(name: str) -> None:
        assert locks.acquire_lock(KEY, name)
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.1)
        came.append(name)
        inside[0] -= 1
        locks.release_lock(KEY, name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert came == []
    locks.release_lock(KEY, "holder")
    for thread in threads:
        thread.join(300)
    assert sorted(came) == ["one", "two"]
    assert most == [1]


def test_a_killed_holder_frees_it(
    where: Store, started: Callable[[], subprocess.Popen[str]]
) -> None:
    """Two wait for a process that is ended by SIGKILL: both get it, one after the other."""
    locks, came = FileLocks(), list[str]()
    holder = started()
    assert held(holder)
    assert locks.is_locked(KEY)
    assert where.working() == [where.root / LOCKS / f"{KEY}.lock"]

    def work(name: str) -> None:
        assert locks.acquire_lock(KEY, name)
        came.append(name)
        locks.release_lock(KEY, name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert came == []
    # Not fetched by its parent yet, so its pid is still there: it holds nothing all the same.
    holder.send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join(300)
    assert sorted(came) == ["one", "two"]
    assert where.working() == []


def test_processes_wait_for_each_other(
    where: Store, started: Callable[[], subprocess.Popen[str]]
) -> None:
    locks, other = FileLocks(), started()
    assert held(other)
    assert not locks.acquire_lock(KEY, "one", acquire_timeout=0.3)
    other.communicate("let go\n", timeout=300)
    assert other.returncode == 0
    assert not locks.is_locked(KEY)
    assert locks.acquire_lock(KEY, "one", acquire_timeout=0.3)
    locks.release_lock(KEY, "one")


def test_a_key_is_a_file_of_the_store(where: Store, tmp_path: Path) -> None:
    assert FileLocks().acquire_lock(KEY, "one")
    names = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert names == [Path(f"mta/store/{LOCKS}/{KEY}.lock")]
    FileLocks().release_lock(KEY, "one")

"""Two runs that want the same work share it: threads, processes, one killed, other machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.store import claims, processes
from tasks.store.artifacts import Store
from tasks.store.claims import Claims, FolderBoard
from tasks.store.pieces import digest

KEY = digest("some work")
# A maker that says when it works, and works until it is let go.
MAKER = """
import sys, time
from pathlib import Path
from tasks.store.artifacts import Store
root, key, mark, go = sys.argv[1:]
def make(out):
    with open(mark, "a") as file:
        file.write("made\\n")
    while not Path(go).exists():
        time.sleep(0.02)
    (out / "file").write_text("weights")
    return {"answer": 42}
piece = Store(Path(root)).get("bank", key, make)
print(piece.ref["sha256"], piece.cached)
"""
# One that claims rows a batch shares with others, and makes each row that it does not find.
BATCH = """
import sys, time
from pathlib import Path
from tasks.store.artifacts import Store
from tasks.store.pieces import digest
root, mark, *rows = sys.argv[1:]
where = Store(Path(root))
def make(out):
    known = where.find_rows("stacking", rows)
    todo = [row for row in rows if row not in known]
    with open(mark, "a") as file:
        file.write("".join(f"{row}\\n" for row in todo))
    time.sleep(0.3)
    return {"rows": rows}
where.get("stacking", digest(rows), make, rows)
"""


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []

    def start(script: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def wait_for(true: Callable[[], bool]) -> None:
    for _ in range(1500):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError("waited for half a minute")


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def test_of_two_processes_one_makes_and_both_get_it(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    mark, go = tmp_path / "mark", tmp_path / "go"
    two = [started(MAKER, tmp_path / "store", KEY, mark, go) for _ in range(2)]
    wait_for(lambda: bool(lines(mark)))
    time.sleep(1.5)  # the other has started, too, and waits
    go.touch()
    said = sorted(process.communicate(timeout=30)[0].split() for process in two)
    assert lines(mark) == ["made"]
    assert [cached for _, cached in said] == ["False", "True"]
    assert said[0][0] == said[1][0]
    assert Store(tmp_path / "store").working() == []


def test_a_killed_maker_frees_its_work(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    mark, go = tmp_path / "mark", tmp_path / "go"
    first = started(MAKER, tmp_path / "store", KEY, mark, go)
    wait_for(lambda: bool(lines(mark)))
    second = started(MAKER, tmp_path / "store", KEY, mark, go)
    time.sleep(1.5)
    assert lines(mark) == ["made"]
    # Not fetched by its parent yet, so its pid is still there: it holds nothing all the same.
    first.send_signal(signal.SIGKILL)
    wait_for(lambda: len(lines(mark)) == 2)
    go.touch()
    out, _ = second.communicate(timeout=30)
    assert out.split()[1] == "False"
    first.wait()
    where = Store(tmp_path / "store")
    where.sweep()
    assert where.working() == []
    assert where.find("bank", KEY) is not None


def test_batches_that_share_users_make_each_once(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    """Three batches at once in a ring, each sharing users with the other two."""
    rows = {name: digest(name) for name in "abcdef"}
    batches = [[rows[name] for name in names] for names in ("abcd", "cdef", "efab")]
    mark = tmp_path / "mark"
    three = [started(BATCH, tmp_path / "store", mark, *batch) for batch in batches]
    for process in three:
        assert process.wait(30) == 0
    assert sorted(lines(mark)) == sorted(rows.values())


def test_threads_share_as_processes_do(tmp_path: Path) -> None:
    """Twenty at once want the same piece: it is made once."""
    where = Store(tmp_path / "store")
    made: list[int] = []
    got: list[Any] = []

    def make(_out: Path) -> dict[str, Any]:
        made.append(1)
        time.sleep(0.3)
        return {}

    threads = [
        threading.Thread(target=lambda: got.append(where.get("bank", KEY, make))) for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(made), len(got)) == (1, 20)
    assert len({piece.ref["sha256"] for piece in got}) == 1


def test_whoever_waits_is_told_whom_for(tmp_path: Path) -> None:
    said: list[str] = []
    where = Store(tmp_path / "store", warn=said.append)
    inside, go = threading.Event(), threading.Event()

    def make(_out: Path) -> dict[str, Any]:
        inside.set()
        assert go.wait(20)
        return {}

    first = threading.Thread(target=where.get, args=("bank", KEY, make))
    second = threading.Thread(target=where.get, args=("bank", KEY, make))
    first.start()
    assert inside.wait(20)
    second.start()
    wait_for(lambda: bool(said))
    go.set()
    first.join(20)
    second.join(20)
    assert len(said) == 1
    assert f"store: bank: process {os.getpid()} on" in said[0]


def test_a_failed_maker_lets_the_next_one_try(tmp_path: Path) -> None:
    where = Store(tmp_path / "store")

    def fails(_out: Path) -> dict[str, Any]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        where.get("bank", KEY, fails)
    assert not where.get("bank", KEY, lambda _out: {}).cached


def elsewhere(board: FolderBoard, key: str, name: str = "other-host~1~1~x") -> None:
    text = json.dumps({"names": [key[: claims.NAME_LENGTH]], "beat": 0})
    board.write("bank", name, text.encode())


def shortened(
    monkeypatch: pytest.MonkeyPatch, stale: float, beat: float = claims.BEAT_SECONDS
) -> None:
    """A claim is renewed every `beat` seconds, and ends where it was not for `stale`."""
    monkeypatch.setattr(claims, "STALE_SECONDS", stale)
    monkeypatch.setattr(claims, "BEAT_SECONDS", beat)


def test_another_machines_claim_ends_when_it_is_not_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock is not asked: what counts is how long the waiter saw no renewal."""
    shortened(monkeypatch, stale=0.6)
    board = FolderBoard(tmp_path)
    elsewhere(board, KEY)
    os.utime(tmp_path / "bank" / "other-host~1~1~x", (1, 1))
    before = time.monotonic()
    with Claims(board, lambda _line: None).held("bank", [KEY]):
        assert time.monotonic() - before >= 0.6
        assert len(board.names("bank")) == 1
    assert board.names("bank") == []


def test_a_renewed_claim_of_another_machine_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A holder beats every 0.1 s for 1.5 s, as another machine would see it."""
    shortened(monkeypatch, stale=0.5, beat=0.1)
    board = FolderBoard(tmp_path)
    ended: list[float] = []

    def work() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(processes, "host", lambda: "other-host")
            holding = Claims(board, lambda _line: None).held("bank", [KEY])
            holding.__enter__()
        inside.set()
        time.sleep(1.5)
        ended.append(time.monotonic())
        holding.__exit__(None, None, None)

    inside = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    with Claims(board, lambda _line: None).held("bank", [KEY]):
        assert time.monotonic() >= ended[0]
    thread.join(10)


class Slow(FolderBoard):
    """Storage that was away: each look takes longer than a claim may go without renewal."""

    def names(self, stage: str) -> list[str]:
        time.sleep(0.3)
        return super().names(stage)


def test_a_look_that_was_kept_waiting_does_not_end_a_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look counts as one beat of 0.05 s at most: three of 0.3 s are not the 0.2 s."""
    shortened(monkeypatch, stale=0.2, beat=0.05)
    board = Slow(tmp_path)
    elsewhere(board, KEY)
    waiting = Claims(board, lambda _line: None)
    seen: dict[str, tuple[bytes, float, float]] = {}
    names = [KEY[: claims.NAME_LENGTH]]
    held = [waiting._holder("bank", names, "own", seen) for _ in range(5)]
    assert [name is not None for name in held] == [True] * 4 + [False]


def test_claims_of_other_work_are_no_hindrance(tmp_path: Path) -> None:
    """Another key, another stage: no wait; and one that cannot be read may be anybody's."""
    board = FolderBoard(tmp_path)
    elsewhere(board, digest("other work"))
    held = Claims(board, lambda _line: None)
    with held.held("bank", [KEY]), held.held("fusion", [KEY]):
        assert len(board.names("bank")) == 2
    board.write("bank", "other-host~1~1~y", b"{")
    assert held._holder("bank", ["0" * 16], "me", {}) == "other-host~1~1~y"


def test_a_pid_that_was_given_again_holds_nothing(tmp_path: Path) -> None:
    board = FolderBoard(tmp_path)
    pid, start = processes.me().split("~")
    elsewhere(board, KEY, f"{processes.host()}~{pid}~{int(start) - 100}~x")
    with Claims(board, lambda _line: None).held("bank", [KEY]):
        assert len(board.names("bank")) == 1
    assert abs(psutil.Process().create_time() - int(start)) <= 1


def test_a_claim_from_before_the_machine_was_started_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this machine by name and id, in any container of it; nothing is waited for."""
    monkeypatch.setattr(processes, "host", lambda: "vm-m0123abcd-aaaaaaaa-pid-1")
    board = FolderBoard(tmp_path)
    elsewhere(board, KEY, "vm-m0123abcd-bbbbbbbb-pid-2~1~1~x")
    kept = "vm-m4567abcd-bbbbbbbb-pid-2~1~1~x"
    elsewhere(board, digest("other work"), kept)
    said: list[str] = []
    held = Claims(board, said.append)
    with held.held("bank", [KEY]):
        assert said == []
    assert held.in_force() == [f"{tmp_path}/bank/{kept}"]


def test_no_keys_no_claim(tmp_path: Path) -> None:
    board = FolderBoard(tmp_path)
    with Claims(board, lambda _line: None).held("bank", []):
        assert board.names("bank") == []

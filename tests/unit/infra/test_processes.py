"""Starting, recognising and ending processes; ports; the lock."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra.local import processes
from infra.local.processes import Service
from infra.local.settings import Layout, StackError

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
# Ignores SIGTERM, as a process does that is stuck; has a child; says when both are there.
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print('child', child.pid, flush=True)\n"
    "time.sleep(600)\n",
]


def begin(folder: Path, argv: list[str]) -> Service:
    env = os.environ | {"MTA_ROOT": str(folder)}
    record = processes.start("x", argv, env=env, cwd=folder, log=folder / "x.log")
    layout = Layout(folder)
    layout.make()
    record.save(layout)
    return record


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    # The last, SIGKILL, is waited for as ever.
    signals = [*((sign, 0.2) for sign, _ in processes.SIGNALS[:-1]), processes.SIGNALS[-1]]
    monkeypatch.setattr(processes, "SIGNALS", signals)


@pytest.fixture
def sleeper(tmp_path: Path, impatient: None) -> Iterator[Service]:
    record = begin(tmp_path, SLEEP)
    yield record
    processes.end(processes.part(Layout(tmp_path), "x"))


def child_of(folder: Path) -> int:
    for _ in range(2400):
        line = processes.last_line(folder / "x.log")
        if line.startswith("child "):
            return int(line.split()[1])
        time.sleep(0.05)
    raise AssertionError("the process did not start")


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_a_record_survives_being_saved(tmp_path: Path, sleeper: Service) -> None:
    assert Service.load(Layout(tmp_path), "x") == sleeper
    assert Service.load(Layout(tmp_path), "y") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "x"}'])
def test_a_broken_record_counts_as_none(tmp_path: Path, text: str) -> None:
    layout = Layout(tmp_path)
    layout.make()
    (layout.run / "x.json").write_text(text)
    assert Service.load(layout, "x") is None


def test_a_pid_is_believed_only_while_it_is_the_same_process(sleeper: Service) -> None:
    found = sleeper.process()
    assert found is not None
    assert found.pid == sleeper.pid
    stranger = sleeper.model_copy(update={"create_time": sleeper.create_time - 3600})
    assert stranger.process() is None


def test_a_stranger_with_the_same_pid_is_left_alone(tmp_path: Path) -> None:
    """The pid is this test's own: if `end` believed it, no test would come after."""
    layout = Layout(tmp_path)
    layout.make()
    record = Service(name="x", pid=os.getpid(), create_time=1.0, port=0)
    record.save(layout)
    assert processes.part(layout, "x") == []


def test_end_takes_the_children_too_and_insists(tmp_path: Path, impatient: None) -> None:
    record = begin(tmp_path, STUBBORN)
    child = child_of(tmp_path)
    processes.end(processes.part(Layout(tmp_path), "x"))
    assert record.process() is None
    assert gone(child)


def test_children_are_found_after_their_parent_was_killed(tmp_path: Path, impatient: None) -> None:
    record, layout = begin(tmp_path, STUBBORN), Layout(tmp_path)
    child = child_of(tmp_path)
    parent = record.process()
    assert parent is not None
    parent.kill()
    psutil.wait_procs([parent], timeout=300)
    assert [process.pid for process in processes.part(layout, "x")] == [child]
    # Another part's, and another stack's, are theirs.
    assert processes.part(layout, "y") == []
    assert processes.part(Layout(tmp_path / "elsewhere"), "x") == []
    processes.end(processes.part(layout, "x"))
    assert gone(child)


def test_a_free_port_is_kept_and_a_taken_one_is_not() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        other = processes.free_port(port)
        assert other != port
        assert processes.free_port(other) == other


def test_what_a_run_would_notice_is_read_from_the_process(tmp_path: Path) -> None:
    env = os.environ | {"MTA_ROOT": str(tmp_path), "HF_TOKEN": "secret", "SHLVL": "1"}
    record = processes.start("x", SLEEP, env=env, cwd=tmp_path, log=tmp_path / "x.log")
    process = record.process()
    assert process is not None
    while not (seen := processes.telling(process.environ())):
        time.sleep(0.01)  # the system shows none while a program is put in its place
    process.kill()
    assert seen == processes.telling(env | {"SHLVL": "2"})
    assert seen != processes.telling(env | {"HF_TOKEN": "other"})


def test_waiting_ends_when_the_process_does_and_names_its_last_words(tmp_path: Path) -> None:
    record = begin(tmp_path, [sys.executable, "-c", "print('no such thing')"])
    with pytest.raises(StackError, match=r"^x ended while starting: no such thing"):
        processes.wait_until(record, lambda: False, timeout=300)


def test_waiting_gives_up(sleeper: Service) -> None:
    with pytest.raises(StackError, match=r"^x does not answer after 0 s"):
        processes.wait_until(sleeper, lambda: False, timeout=0.3)


def test_two_commands_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    layout = Layout(tmp_path)
    inside, said = threading.Event(), threading.Event()

    def first() -> None:
        with processes.one_at_a_time(layout):
            inside.set()
            said.wait(300)
            order.append("first")

    def say(text: str) -> None:
        order.append("waits")
        said.set()

    monkeypatch.setattr(processes, "say", say)
    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(300)
    with processes.one_at_a_time(layout):
        order.append("second")
    thread.join()
    assert order == ["waits", "first", "second"]


def test_last_line_skips_frames(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("begin\n│ it broke here │\n╰──────────────╯\n\n")
    assert processes.last_line(log) == "it broke here"
    log.write_text("")
    assert processes.last_line(log) == ""


def test_the_program_refuses_what_it_does_not_know() -> None:
    for arguments in ([], ["sideways"], ["up", "-p", "x=1"]):
        done = subprocess.run(
            [sys.executable, "-m", "infra.local", *arguments],
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert re.fullmatch(r"mta: (Missing|No such) .*\n", done.stderr)
        assert "Traceback" not in done.stderr

"""The rows of a run in a terminal: what they say, and that nothing written meanwhile is lost."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

import pytest
from rich.console import Console

from tasks import live
from tasks.live import ROW, Row, row_of, table, will_run
from tasks.record import Result
from tasks.results.stage import stage
from tasks.running.progress import Progress

PROGRAM = """
import os, subprocess, sys
from tasks.live import live_view, row_of, will_run
with live_view():
    will_run(["LaMP-2M"])
    with row_of("LaMP-2M"):
        print("from this process", file=sys.stderr)
        subprocess.run(["sh", "-c", "echo from a worker >&2"])
        os.write(2, b"from a library\\n")
print("after", file=sys.stderr)
"""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test moves by hand; and a view without a terminal."""
    now = [1000.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(live, "rows", {})
    return now


def shown() -> list[list[str]]:
    """The table's cells, line by line, without the bar."""
    console = Console(record=True, width=80, file=io.StringIO())
    assert live.rows is not None
    console.print(table(live.rows))
    text = console.export_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    return [line.replace("━", "").replace("╸", "").split() for line in text.splitlines()]


def test_what_is_at_work_comes_first(clock: list[float]) -> None:
    """5 of 20 took 20 seconds, so 15 more take 60; the stage began 10 seconds before them."""
    will_run(["LaMP-1", "LaMP-2M", "LaMP-3"])
    with row_of("LaMP-3"):
        own = ROW.get()
        assert own is not None
        own.has(cached=True)
    with row_of("LaMP-2M"):
        own = ROW.get()
        assert own is not None
        own.begins("answers")
        for found in (True, True, False):
            own.has(found)
        clock[0] += 10
        began = clock[0]
        clock[0] += 20
        own.progresses("jobs", 5, 20, began)
        assert shown() == [
            ["cell", "stage", "time", "done", "left", "found", "made"],
            ["LaMP-2M", "answers", "0:00:30", "5/20", "0:01:00", "2", "1"],
            ["LaMP-3", "ended", "1", "0"],
            ["LaMP-1", "waits"],
        ]
        # Another stage has not begun to count.
        own.begins("compare")
        assert shown()[1] == ["LaMP-2M", "compare", "0:00:00", "2", "1"]
    assert ROW.get() is None


def test_the_progress_of_jobs_is_not_that_of_one_of_them() -> None:
    row = Row()
    row.progresses("jobs", 1, 3, 0.0)
    row.progresses("one of them", 70, 90, 0.0)
    assert (row.done, row.total) == (1, 3)
    row.progresses("jobs", 3, 3, 0.0)
    row.progresses("the next", 1, 90, 0.0)
    assert (row.done, row.total) == (1, 90)


class Number(Result):
    value: int


@stage(version=1)
def count_items(value: int) -> Number:
    progress = Progress("count", "items", 4)
    progress.update(value)
    return Number(value=value)


def test_stages_and_progress_tell_the_row_of_their_cell() -> None:
    with row_of("LaMP-1"):
        row = ROW.get()
        assert row is not None
        count_items(3)
        assert (row.stage, row.done, row.total) == ("count-items", 3, 4)
        assert (row.found, row.made) == (0, 1)
    assert row.stage == "ended"
    count_items(4)
    assert row.made == 1


def test_without_a_view_nothing_is_kept() -> None:
    will_run(["LaMP-1"])
    with row_of("LaMP-1"):
        assert ROW.get() is not None
    assert live.rows is None


def test_a_terminal_has_rows_and_the_log_above_them() -> None:
    """On a pseudo-terminal: the lines of all who write, none of them twice, and the cursor seen."""
    outer, inner = pty.openpty()
    # No test runner's own settings of colours or sizes.
    environment = {"PATH": os.environ["PATH"], "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], stderr=inner, env=environment, check=True, timeout=300
    )
    assert done.returncode == 0
    os.close(inner)
    text = ""
    try:
        while part := os.read(outer, 65536):
            text += part.decode()
    except OSError:  # on Linux the end of a pseudo-terminal is an error
        pass
    os.close(outer)
    assert "LaMP-2M" in text
    for line in ("from this process", "from a worker", "from a library", "after"):
        assert text.count(line) == 1
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_elsewhere_there_are_plain_lines() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=300
    )
    lines = ["from this process", "from a worker", "from a library", "after"]
    assert done.stderr.splitlines() == lines
    assert done.stdout == ""

"""What `mta run` shows in a terminal: a row for each cell, below the lines of the log.

    cell     stage       time  done                 left  found  made
    LaMP-2M  answers  0:00:41  ━━━━━━━━━━ 12/35  0:01:18     14    23
    LaMP-3   waits

The flow, the stages and `Progress` tell the row of their cell. Elsewhere there is only the log.
"""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

WAITS, ENDED = "waits", "ended"


@dataclass
class Row:
    """How far a cell is. since: when its stage began. done, total: the progress of `owner`."""

    stage: str = WAITS
    since: float = 0.0
    found: int = 0
    made: int = 0
    done: int = 0
    total: int = 0
    began: float = 0.0
    owner: object = None

    def begins(self, stage: str) -> None:
        """A stage begins, or another job of the same stage."""
        if stage != self.stage:
            self.stage, self.since = stage, time.monotonic()
            self.done, self.total, self.owner = 0, 0, None

    def has(self, cached: bool) -> None:
        """Count a stage's result as found or made."""
        self.found += cached
        self.made += not cached

    def progresses(self, owner: object, done: int, total: int, began: float) -> None:
        """Show the progress of `owner`, one of several jobs, unless another's is still shown."""
        if self.owner in (None, owner):
            self.done, self.total, self.began = done, total, began
            self.owner = owner if done < total else None


# The rows by cell, while there is a view; and the row of the cell that a thread works for.
rows: dict[str, Row] | None = None
ROW: ContextVar[Row | None] = ContextVar("row", default=None)


def table(cells: Mapping[str, Row]) -> Table:
    """The rows: what is at work first, what waits last."""
    shown = Table("cell", "stage", box=None, pad_edge=False, padding=(0, 1))
    for name in ("time", "done", "left", "found", "made"):
        shown.add_column(name, justify="left" if name == "done" else "right")
    now, last = time.monotonic(), {ENDED: 1, WAITS: 2}
    for name, row in sorted([*cells.items()], key=lambda one: last.get(one[1].stage, 0)):
        at_work = row.stage not in last
        bar: RenderableType = ""
        left, spent = "", str(timedelta(seconds=round(now - row.since))) if at_work else ""
        if at_work and row.total:
            bar = Table.grid(padding=(0, 1))
            bar.add_row(ProgressBar(row.total, row.done, width=10), f"{row.done}/{row.total}")
        if at_work and 0 < row.done < row.total:
            seconds = (now - row.began) * (row.total - row.done) / row.done
            left = str(timedelta(seconds=round(seconds)))
        counts = ("", "") if row.stage == WAITS else (str(row.found), str(row.made))
        shown.add_row(name, row.stage, spent, bar, left, *counts)
    return shown


def will_run(cells: Iterable[str]) -> None:
    """Show cells that wait."""
    if rows is not None:
        rows.update({name: Row() for name in cells})


@contextmanager
def row_of(cell: str) -> Iterator[None]:
    """Inside, stages and progress are shown in this cell's row, where there is a view."""
    row = Row() if rows is None else rows.setdefault(cell, Row())
    token = ROW.set(row)
    row.begins("starts")
    try:
        yield
    finally:
        ROW.reset(token)
        row.begins(ENDED)


@contextmanager
def live_view() -> Iterator[None]:
    """In a terminal the rows, and above them whatever is written meanwhile; elsewhere nothing."""
    global rows
    if not sys.stderr.isatty():
        yield
        return
    # The terminal gets its own descriptor: 2 is redirected below.
    terminal = os.fdopen(os.dup(2), "w", encoding="utf-8")
    console, both = Console(file=terminal), sys.stdout.isatty()
    known: dict[str, Row] = {}
    rows = known
    shown = Live(
        get_renderable=lambda: table(known), console=console, transient=True, redirect_stdout=both
    )
    try:
        with shown, _others_above(console, terminal):
            # Rich hides the cursor, and a killed process would leave it hidden.
            console.show_cursor(True)
            yield
    finally:
        rows = None


@contextmanager
def _others_above(console: Console, terminal: TextIO) -> Iterator[None]:
    """Print what workers and libraries write to descriptor 2 as lines above the rows."""
    read, write = os.pipe()
    os.dup2(write, 2)
    os.close(write)

    def show() -> None:
        with open(read, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                console.print(Text(line.rstrip("\n")))

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.dup2(terminal.fileno(), 2)
        thread.join(1.0)  # a process that lives on holds the other end

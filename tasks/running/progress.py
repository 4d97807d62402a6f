"""How far a piece of work is: in the Prefect UI, and in a terminal."""

import multiprocessing
import re
import sys
import time
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext
from tqdm import tqdm

from tasks.live import ROW
from tasks.log import log

# Seconds between two updates. Work that is over sooner costs the server no requests.
PAUSE_SECONDS = 1.0


class Progress:
    """A progress artifact in the Prefect UI, of work that lasts; a bar, or a row, in a terminal.

    Used from the flow and from tasks, by one thread. Failing to report never fails the work.
    """

    def __init__(self, key: str, what: str, total: int) -> None:
        self.what, self.total, self.done = what, max(total, 1), 0
        # A key of its own for each LaMP task, as several run at once. Prefect's artifact keys:
        # lower-case letters, digits and dashes.
        self._key = re.sub("[^a-z0-9]+", "-", f"{key} {what}".lower()).strip("-")
        # No bar in a worker's log, and none of worker processes: they know nothing of each other.
        drawn = sys.stderr.isatty() and multiprocessing.parent_process() is None
        self._bar = tqdm(total=self.total, desc=what, leave=False, disable=not drawn)
        # Prefect types its sync calls as "or a coroutine".
        self._artifact: Any = None
        self._began = self._last = time.monotonic()
        self._row = ROW.get()

    def update(self, done: int, total: int | None = None) -> None:
        """`done` of `total` (as before, unless given) is done."""
        self.done, self.total = done, total or self.total
        self._bar.total = self.total
        self._bar.update(done - self._bar.n)
        if self._row:
            self._row.progresses(self, done, self.total, self._began)
        over = done >= self.total
        if over:
            self._bar.close()
        now = time.monotonic()
        if (over and self._artifact) or (not over and now - self._last >= PAUSE_SECONDS):
            self._last = now
            try:
                self._show()
            except Exception as error:
                log(f"progress of {self.what} cannot be shown ({type(error).__name__})", True)

    def advance(self) -> None:
        self.update(self.done + 1)

    def _show(self) -> None:
        percent, text = 100.0 * self.done / self.total, f"{self.what}: {self.done} of {self.total}"
        if self._artifact:
            update_progress_artifact(self._artifact, percent, description=text)
        elif FlowRunContext.get() or TaskRunContext.get():
            self._artifact = create_progress_artifact(percent, key=self._key, description=text)

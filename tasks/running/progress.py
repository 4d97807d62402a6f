"""How far a piece of work is: in the Prefect UI, and in a terminal."""

from __future__ import annotations

import multiprocessing
import re
import sys
import threading
import time
import weakref
from contextvars import copy_context
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext
from tqdm import tqdm

from tasks.log import log

# Work that is over sooner, such as what is found in the store, costs the server no requests.
SHOWN_AFTER = 1.0
# Between two updates of what is shown.
PAUSE_SECONDS = 1.0


class Progress:
    """A progress artifact in the Prefect UI, of work that lasts; a bar in a terminal.

    Used from the flow and from tasks. Failing to report never fails the work.
    """

    def __init__(self, key: str, what: str, total: int) -> None:
        self.what, self.total, self.done = what, max(total, 1), 0
        # A key of its own for each LaMP task, as several run at once. Prefect's artifact keys:
        # lower-case letters, digits and dashes.
        self._key = re.sub("[^a-z0-9]+", "-", f"{key} {what}".lower()).strip("-")
        # In a terminal a bar as well; a worker's log gets none. Nor do worker processes draw: they
        # know nothing of each other's bars.
        drawn = sys.stderr.isatty() and multiprocessing.parent_process() is None
        self._bar = tqdm(total=self.total, desc=what, leave=False, disable=not drawn)
        # Prefect types its sync calls as "or a coroutine".
        self._artifact: Any = None
        self._last = 0.0
        self._guard = threading.Lock()
        # Of work that has ended, however it did, nobody holds this any more, and nothing is shown.
        self._timer = threading.Timer(SHOWN_AFTER, _show, [weakref.ref(self), copy_context()])
        self._timer.daemon = True
        try:
            self._timer.start()
        except RuntimeError as error:  # no more threads
            self._warn(error)

    def update(self, done: int, total: int | None = None) -> None:
        """`done` of `total` (as before, unless given) is done."""
        with self._guard:
            self.done = done
            self.total = total or self.total
            self._bar.total = self.total
            self._bar.update(done - self._bar.n)
            over = done >= self.total
            if over:
                self._timer.cancel()
                self._bar.close()
            now = time.monotonic()
            if self._artifact is None or (now - self._last < PAUSE_SECONDS and not over):
                return
            self._last = now
            try:
                update_progress_artifact(
                    self._artifact, 100.0 * done / self.total, description=self._text()
                )
            except Exception as error:
                self._warn(error)

    def advance(self) -> None:
        self.update(self.done + 1)

    def show(self) -> None:
        """Make the artifact, unless all is done or there is no run."""
        with self._guard:
            outside = FlowRunContext.get() is None and TaskRunContext.get() is None
            if self.done >= self.total or outside:
                return
            try:
                self._artifact = create_progress_artifact(
                    100.0 * self.done / self.total, key=self._key, description=self._text()
                )
            except Exception as error:
                self._warn(error)
            self._last = time.monotonic()

    def _warn(self, error: Exception) -> None:
        log(f"progress of {self.what} cannot be shown ({type(error).__name__})", warning=True)

    def _text(self) -> str:
        return f"{self.what}: {self.done} of {self.total}"


def _show(progress: weakref.ref[Progress], context: Any) -> None:
    """In the timer's thread; `context`: that of the run that the artifact and the log belong to."""
    if shown := progress():
        context.run(shown.show)

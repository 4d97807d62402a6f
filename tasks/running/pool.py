"""The pool of worker processes, shared by a flow and its sub-flows (`compute.workers=processes`).

Prefect's own runner makes a pool for each flow run: every LaMP task would start its processes and
import torch again. And one process that is killed breaks its pool for good: here the job goes to a
fresh process, and what it had finished is found in the store.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, Self

from prefect import Task
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

from tasks.stage import StageFailed, looked_up, uses_model

# A job that ends its process this often does it itself (out of memory, say).
TRIES = 4
# Before it is tried again where the server did not answer, in seconds: it may be started again.
PAUSES = (5.0, 20.0, 60.0)


class Shared:
    """Mixin of a task runner: the flow enters it first, then sub-flows, in threads of their own.

    Opened by the first who enters, closed by the last who leaves.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._inside = 0
        self._ended = False
        self._guard = threading.RLock()

    def duplicate(self) -> Self:
        """Itself: Prefect duplicates the runner for each flow run."""
        return self

    def __enter__(self) -> Self:
        with self._guard:
            self._inside += 1
            if self._inside == 1:
                super().__enter__()  # type: ignore[misc]
        return self

    def __exit__(self, *error: Any) -> None:
        with self._guard:
            self._inside -= 1
            if self._inside == 0:
                super().__exit__(*error)  # type: ignore[misc]

    def kill(self) -> None:
        """Take no more jobs, and end those that can be: nobody waits for them any more."""
        self._ended = True

    def refuse(self) -> None:
        """Raises StageFailed after `kill`: what else runs of the flow must not go on."""
        if self._ended:
            raise StageFailed("the run has ended")

    def __reduce__(self) -> tuple[Any, ...]:
        # A job carries its flow, and so the runner; in the worker nothing is submitted further.
        return (ThreadPoolTaskRunner, (1,))


class SharedThreads(Shared, ThreadPoolTaskRunner[Any]):
    """Jobs as threads of this process."""

    def submit(self, task: Task[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.refuse()
        return super().submit(task, *args, **kwargs)


class SharedProcesses(Shared, ProcessPoolTaskRunner):
    """Jobs that run the model in worker processes, which end with this one, however it ends.

    What is short stays here, in threads: the other stages, and jobs that are found in the store. A
    process is started, and imports torch, only when there is something to make.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._here = SharedThreads(max_workers=self._max_workers)

    def submit(
        self, task: Task[..., Any], parameters: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        self.refuse()
        if not uses_model(task):
            return self._here.submit(task, parameters, *args, **kwargs)
        with looked_up(task, parameters) as found:
            if found:
                return self._here.submit(task, parameters, *args, **kwargs)
        with self._guard:
            # Prefect keeps the context of the first who submits: that of another flow run here.
            self._cached_context = None
            return super().submit(task, parameters, *args, **kwargs)

    def __enter__(self) -> Self:
        with self._guard:
            super().__enter__()
            self._here.__enter__()
            if self._inside == 1:
                # Imported here, as it is Prefect's own: it sends logs and events to this process.
                from prefect.task_runners import _initialize_process_pool_worker

                start = (self._subprocess_message_queue, end_with_parent, ())
                make = partial(
                    ProcessPoolExecutor,
                    max_workers=1,
                    mp_context=multiprocessing.get_context("spawn"),
                    initializer=_initialize_process_pool_worker,
                    initargs=start,
                )
                self._executor = Workers(self._max_workers, make)  # type: ignore[assignment]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._here.__exit__(*error)

    def kill(self) -> None:
        super().kill()
        if self._executor is not None:
            self._executor.kill()  # type: ignore[attr-defined]


class Workers:
    """So many processes, each in a pool of one: the end of one is nothing to the others.

    `make` gives a `ProcessPoolExecutor` of one process.
    """

    def __init__(self, count: int, make: Callable[[], ProcessPoolExecutor]) -> None:
        self._make, self._count = make, count
        self._own = threading.local()
        self._all: list[ProcessPoolExecutor] = []
        self._killed = False
        self._guard = threading.Lock()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="worker-process")

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Run `call` in the next free process; in a fresh one if that is killed.

        Raises BrokenProcessPool, in the future, when TRIES processes ended under the job.
        """
        return self._threads.submit(self._run, call)

    def _run(self, call: Callable[[], Any]) -> Any:
        for tried in range(1, TRIES + 1):
            process = self._process()
            try:
                return process.submit(call).result()
            except BrokenProcessPool:
                self._own.process = None
                with self._guard:
                    self._all.remove(process)
                if tried == TRIES or self._killed:
                    raise
            except SystemExit as error:
                # How Prefect gives a job up that it could not begin: its server did not answer.
                # Let through, it would end the thread that the future's waiters wait for.
                if tried == TRIES or self._killed:
                    raise BrokenProcessPool("the Prefect server did not answer") from error
                time.sleep(PAUSES[tried - 1])
        raise AssertionError("unreachable")

    def _process(self) -> ProcessPoolExecutor:
        """This thread's process; made when it has none."""
        if getattr(self._own, "process", None) is None:
            with self._guard:
                if self._killed:
                    raise BrokenProcessPool("the run has ended")
                self._own.process = self._make()
                self._all.append(self._own.process)
        process: ProcessPoolExecutor = self._own.process
        return process

    def kill(self) -> None:
        """End all processes now, and start no more."""
        with self._guard:
            self._killed = True
            processes = list(self._all)
        for process in processes:
            for worker in list((process._processes or {}).values()):
                worker.kill()

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        """As `Executor.shutdown`: jobs under way are waited for."""
        self._threads.shutdown(wait=wait, cancel_futures=cancel_futures)
        for process in self._all:
            process.shutdown(wait=wait, cancel_futures=cancel_futures)


def end_with_parent() -> None:
    """In a worker process: end at once when the process that started it is gone, even by SIGKILL.

    It would else finish its job and then wait for another for ever, with memory and a gpu slot.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_exit, args=(parent,), daemon=True).start()


def _wait_and_exit(parent: Any) -> None:
    parent.join()
    os._exit(1)

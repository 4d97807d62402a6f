"""`@stage`: a function of typed options and typed results as a cached Prefect task.

    @stage(version=4, libraries=("numpy", "polars"))
    def fusion(options: FusionOptions, embedded: Embedded, bank: Bank) -> Recipes: ...

Its cache key is the hash of its name, its version, the libraries that decide its numbers and its
arguments (tasks/record.py). Prefect keeps the result as JSON and finds it again (state `Cached`);
two runs that want the same share it. After a hit the files' hashes are checked: what is gone or
damaged is made again.

Inside a flow run a call is a task run of that flow; elsewhere it is the plain function.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path, PurePath
from typing import Any, Generic, ParamSpec, TypeVar, cast

from prefect import State, Task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.context import FlowRunContext
from prefect.filesystems import LocalFileSystem, RemoteFileSystem
from prefect.futures import PrefectFuture
from prefect.results import ResultRecord, ResultRecordMetadata
from prefect.states import Completed
from prefect.task_runners import TaskRunner

from tasks.errors import DiskFull, InputError, StorageError, disk_full, short, transient
from tasks.log import log
from tasks.record import Result, digest, files_of, key_of, library_versions
from tasks.results.lock import lock_manager
from tasks.results.store import RESULTS, store, store_place
from tasks.results.trusted import as_written
from tasks.stand_in import stand_in

P = ParamSpec("P")
R = TypeVar("R", bound=Result)
# How long a stage waits before it tries again, in seconds; with those of Prefect's own client a
# server may be away for some minutes.
DELAYS = [2.0, 10.0, 30.0, 60.0]
# Where stages that run the model are sent; in the flow's own threads where it is not set.
RUNNER: ContextVar[TaskRunner[Any] | None] = ContextVar("runner", default=None)
# What task runs are named by: the LaMP task, the seed and the number of items.
CELL: ContextVar[str] = ContextVar("cell", default="")


@contextmanager
def within(name: str) -> Iterator[None]:
    """Task runs that are begun inside are named by this, too."""
    token = CELL.set(", ".join(filter(None, (CELL.get(), name))))
    try:
        yield
    finally:
        CELL.reset(token)


class StageFailed(InputError):
    """A stage did not give its result, for its input or for a fault of ours; in one line."""


class Stage(Generic[P, R]):
    """A function that gives a Result, cached by its arguments.

    uses_model: whether it runs the base model, so that it goes to the runner of models.
    """

    def __init__(
        self,
        function: Callable[P, R],
        version: int,
        libraries: tuple[str, ...],
        uses_model: bool,
    ) -> None:
        self.__doc__, self.__module__ = function.__doc__, function.__module__
        self.function, self.version, self.libraries = function, version, libraries
        self.uses_model = uses_model
        self.name = function.__name__
        self._signature = inspect.signature(function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The result. Raises StageFailed, in one line, where a flow's stage gives none."""
        return self.submit(*args, **kwargs).result()

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Job[R]:
        """Begin a task run of this flow; it is waited for by `result` of what is returned."""
        return self.begin(self._bound(args, kwargs))

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The cache key of these arguments."""
        return self._key(self._bound(args, kwargs))

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    @property
    def identity(self) -> list[Any]:
        """What of the stage itself decides its numbers: for the keys of rows and checkpoints."""
        return [self.name, self.version, library_versions(self.libraries)]

    def _key(self, arguments: dict[str, Any]) -> str:
        return f"{self.name}-{digest([*self.identity, key_of(arguments)])}"

    def begin(self, arguments: dict[str, Any], refresh: bool = False) -> Job[R]:
        """As `submit`, by the names of arguments. refresh: make it, whether it is there or not."""
        if planned := stand_in(self.name):
            return Job(self, arguments, state=Completed(data=planned(**arguments)))
        if FlowRunContext.get() is None:
            return Job(self, arguments, state=Completed(data=self.made(arguments)))
        where = _result_storage()
        record = None if refresh else _record(where, self._key(arguments))
        found = record is not None and as_written(record)
        task = self._task(where, refresh or (record is not None and not found))
        runner = RUNNER.get()
        # What is there needs no process: this thread finds it.
        if runner is None or not self.uses_model or found:
            state = cast("State[R]", task(arguments, return_state=True))
            return Job(self, arguments, state=state)
        return Job(self, arguments, runner.submit(task, {"arguments": arguments}))

    def made(self, arguments: dict[str, Any]) -> R:
        """Run the function; note how long it took and what it was made of."""
        _end_with_parent()
        started = time.perf_counter()
        function: Callable[..., R] = self.function
        made = function(**arguments)
        uris = sorted({file.folder for file in files_of(arguments)})
        seconds = made.seconds or round(time.perf_counter() - started, 3)
        return made.model_copy(update={"seconds": seconds, "made_of": tuple(uris)})

    def _task(self, where: Any, refresh: bool) -> Task[..., R]:
        policy = CacheKeyFnPolicy(
            cache_key_fn=lambda _context, given: self._key(given["arguments"])
        ).configure(isolation_level="SERIALIZABLE", lock_manager=lock_manager())
        return Task(
            self.made,
            name=self.name,
            task_run_name=", ".join(filter(None, (self.name.replace("_", "-"), CELL.get()))),
            cache_policy=policy,
            refresh_cache=refresh,
            persist_result=True,
            result_storage=where,
            result_serializer="json",
            retries=len(DELAYS),
            retry_delay_seconds=DELAYS,
            retry_jitter_factor=0.5,
            retry_condition_fn=_may_pass,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # By name: in another process it is what stands in the module there.
        return _named, (self.__module__, self.name)


class Job(Generic[R]):
    """A task run that was begun: its future, or the state it ended in."""

    def __init__(
        self,
        stage: Stage[..., R],
        arguments: dict[str, Any],
        future: PrefectFuture[R] | None = None,
        state: State[R] | None = None,
    ) -> None:
        self._stage, self._arguments = stage, arguments
        self._future, self._state, self._cell = future, state, CELL.get()

    def result(self) -> R:
        """Wait for the result. Raises DiskFull where the disk takes no more, else StageFailed."""
        state = self._state or self._ended()
        if not state.is_completed():
            failure = _failure(state, self._stage.name)
            _remove_error(state)
            raise failure
        result = state.result()
        if state.name != "Cached":
            return result
        if not all(store().intact(file) for file in files_of(result)):
            log(f"store: files of {self._stage.name} are gone or damaged: it is made again", True)
            token = CELL.set(self._cell)  # it has the same name
            try:
                return self._stage.begin(self._arguments, refresh=True).result()
            finally:
                CELL.reset(token)
        return result.model_copy(update={"cached": True})

    def _ended(self) -> State[R]:
        assert self._future is not None
        try:
            self._future.wait()
        except Exception as error:  # a stage's own errors are in its state
            why = short(error) or type(error).__name__
            raise StageFailed(
                f"{self._stage.name}: its process was lost ({why}); start the run again, what is "
                "finished is kept"
            ) from error
        return self._future.state


def stage(
    version: int, libraries: Iterable[str] = (), uses_model: bool = False
) -> Callable[[Callable[P, R]], Stage[P, R]]:
    """Decorator: a function that gives a Result as a cached stage.

    version: raised when the function gives other results than before. libraries: those that decide
    its numbers, by their distributions' names.
    """

    def decorate(function: Callable[P, R]) -> Stage[P, R]:
        return Stage(function, version, tuple(libraries), uses_model)

    return decorate


def _named(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _result_storage() -> Any:
    """Where Prefect keeps results: a folder, or a block of the server for a store at a URL."""
    where = store()
    if where.remote is None:
        return where.root / RESULTS
    name = f"mta-{digest(store_place())[:12]}"
    block = RemoteFileSystem(basepath=f"{where.remote.url}/{RESULTS}")
    block.save(name, overwrite=True, _sync=True)  # type: ignore[call-arg]
    return block


def _record(where: Any, key: str) -> bytes | None:
    """What Prefect kept under a key, if anything."""
    kept: Any = LocalFileSystem(basepath=str(where)) if isinstance(where, Path) else where
    try:
        content: bytes = kept.read_path(key, _sync=True)
        return content
    except (ValueError, OSError):
        return None


def _may_pass(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a failed run of a stage is tried again: where its error may be gone by then."""
    error = state.result(raise_on_failure=False)
    if not isinstance(error, BaseException) or transient(error):
        return isinstance(error, BaseException)
    if not isinstance(error, InputError) and not disk_full(error):
        # Prefect logs a traceback only of what was tried again.
        log("".join(traceback.format_exception(error)), warning=True)
    return False


def _failure(state: State[Any], name: str) -> Exception:
    """Why a run did not complete, as an exception whose message is one line."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, InputError):
        return StageFailed(str(error))
    if isinstance(error, BaseException) and (line := disk_full(error)):
        return DiskFull(line)
    message = " ".join((state.message or state.name or "no reason given").split())
    shown = message.removeprefix("Task run encountered an exception ")[:500]
    return StageFailed(f"{name}: {shown}")


def _remove_error(state: State[Any]) -> None:
    """Prefect keeps an error as a result, too. It is none, and may name a user."""
    data = state.data
    if isinstance(data, ResultRecord) and isinstance(data.result, StorageError):
        return  # it could not be written, and cannot be removed
    metadata = data.metadata if isinstance(data, ResultRecord) else data
    if isinstance(metadata, ResultRecordMetadata) and metadata.storage_key:
        with suppress(StorageError):
            store().remove(store().root / RESULTS / PurePath(metadata.storage_key).name)


@functools.cache
def _end_with_parent() -> None:
    """In a worker process: end at once when the process that started it is gone, even by SIGKILL.

    It would else wait for another job for ever, with memory and a gpu slot.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:

        def wait_and_exit() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=wait_and_exit, daemon=True).start()

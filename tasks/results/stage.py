"""`@stage`: a function of typed options and typed results as a cached Prefect task.

    @stage(version=4, libraries=("numpy", "polars"))
    def fusion(options: FusionOptions, embedded: Embedded, bank: Bank) -> Recipes: ...

Its cache key is the hash of its name, its version, the libraries that decide its numbers and its
arguments (tasks/record.py). Prefect keeps the result as JSON and finds it again (state `Cached`);
two runs that want the same share it. Before that the files' hashes are checked: what is gone or
damaged is made again. Inside a flow run a call is a task run, elsewhere the plain function.
"""

import functools
import inspect
import json
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Generic, ParamSpec, TypeVar, cast

from prefect import State, Task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.context import FlowRunContext
from prefect.filesystems import RemoteFileSystem
from prefect.futures import PrefectFuture
from prefect.serializers import JSONSerializer
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner
from prefect.utilities.annotations import quote

from tasks.errors import DiskFull, InputError, StorageError, disk_full, short, transient
from tasks.live import ROW
from tasks.log import log
from tasks.record import Result, digest, files_of, key_of, library_versions
from tasks.results.lock import FileLocks
from tasks.results.store import RESULTS, store
from tasks.stand_in import PLANNER

P = ParamSpec("P")
R = TypeVar("R", bound=Result)
# Seconds before each retry. With the retries of Prefect's client they outlast a server that is away
# for some minutes.
DELAYS = [2.0, 10.0, 30.0, 60.0]
# The runner of stages that run the model; None: the flow's own threads run them.
RUNNER: ContextVar[TaskRunner[Any] | None] = ContextVar("runner", default=None)
# A part of task runs' names: the LaMP task, the seed and the number of items.
CELL: ContextVar[str] = ContextVar("cell", default="")


@contextmanager
def within(name: str) -> Iterator[None]:
    """Add this to the names of the task runs that begin inside."""
    token = CELL.set(", ".join(filter(None, (CELL.get(), name))))
    try:
        yield
    finally:
        CELL.reset(token)


class StageFailed(InputError):
    """A stage gave no result, for its input or for a fault of ours; in one line."""


@dataclass
class Job(Generic[R]):
    """A task run that has begun: its future, or the state it ended in."""

    name: str
    begun: PrefectFuture[R] | State[R]

    def result(self) -> R:
        """Wait for the result. Raises DiskFull where the disk takes no more, else StageFailed."""
        state = self.begun
        if not isinstance(state, State):
            try:
                state.wait()
            except Exception as error:  # a stage's own errors are in its state
                why = short(error) or type(error).__name__
                raise StageFailed(
                    f"{self.name}: its process was lost ({why}); start the run again, what is "
                    "finished is kept"
                ) from error
            state = state.state
        if not state.is_completed():
            raise _failure(state, self.name)
        result, cached = state.result(), state.name == "Cached"
        if row := ROW.get():
            row.has(cached=cached)
        return result.model_copy(update={"cached": True}) if cached else result


class Stage(Generic[P, R]):
    """A function that gives a Result, cached by its arguments.

    uses_model: whether it runs the base model, so that it goes to the runner of models.
    """

    def __init__(
        self, function: Callable[P, R], version: int, libraries: tuple[str, ...], uses_model: bool
    ) -> None:
        functools.update_wrapper(self, function)
        self.name, self.function, self.version = function.__name__, function, version
        self.libraries, self.uses_model = libraries, uses_model

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The result. Raises StageFailed, in one line, where a flow's stage gives none."""
        return self.submit(*args, **kwargs).result()

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Job[R]:
        """Begin a task run of this flow; the job's `result` waits for it."""
        arguments = self._bound(*args, **kwargs)
        if planned := PLANNER.get()(self.name):
            return Job(self.name, Completed(data=planned(**arguments)))
        if row := ROW.get():
            row.begins(self.name.replace("_", "-"))
        if FlowRunContext.get() is None:
            return Job(self.name, Completed(data=self.made(arguments)))
        storage, key = _result_storage(), self._key(arguments)
        try:
            usable = _usable(storage, key)
        except StorageError as error:  # of this job alone
            return Job(self.name, Failed(message=str(error), data=error))
        task, runner = self._task(storage, key, refresh=usable is False), RUNNER.get()
        # A cached result needs no process: this thread reads it. `quote`: Prefect would look for
        # futures in all arguments, down to each loss of each training.
        if runner is None or not self.uses_model or usable:
            state = cast("State[R]", task(quote(arguments), return_state=True))
            return Job(self.name, state)
        return Job(self.name, runner.submit(task, {"arguments": arguments}))

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The cache key of these arguments."""
        return self._key(self._bound(*args, **kwargs))

    def _bound(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        bound = inspect.signature(self.function).bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    @property
    def identity(self) -> list[Any]:
        """What of the stage itself decides its numbers: for the keys of rows and checkpoints."""
        return [self.name, self.version, library_versions(self.libraries)]

    def _key(self, arguments: dict[str, Any]) -> str:
        return f"{self.name}-{digest([*self.identity, key_of(arguments)])}"

    def made(self, arguments: dict[str, Any]) -> R:
        """Run the function; note how long it took and what it was made of."""
        _end_with_parent()
        started = time.perf_counter()
        function: Callable[..., R] = self.function
        made = function(**arguments)
        uris = sorted({file.folder for file in files_of(arguments)})
        seconds = made.seconds or round(time.perf_counter() - started, 3)
        return made.model_copy(update={"seconds": seconds, "made_of": tuple(uris)})

    def _task(self, storage: Path | RemoteFileSystem, key: str, refresh: bool) -> Task[..., R]:
        return Task(
            self.made,
            name=self.name,
            task_run_name=", ".join(filter(None, (self.name.replace("_", "-"), CELL.get()))),
            cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda *_: key).configure(
                isolation_level="SERIALIZABLE", lock_manager=FileLocks()
            ),
            refresh_cache=refresh,
            persist_result=True,
            result_storage=storage,
            result_serializer="json",
            retries=len(DELAYS),
            retry_delay_seconds=DELAYS,
            retry_jitter_factor=0.5,
            retry_condition_fn=_may_pass,
        )

    def __reduce__(self) -> str:
        return self.name  # in another process it is what stands in the module there


def stage(
    version: int, libraries: Iterable[str] = (), uses_model: bool = False
) -> Callable[[Callable[P, R]], Stage[P, R]]:
    """Decorator: a function that gives a Result as a cached stage.

    version: raised when the function gives other results than before. libraries: those that decide
    its numbers, by their distributions' names.
    """
    return lambda function: Stage(function, version, tuple(libraries), uses_model)


def _result_storage() -> Path | RemoteFileSystem:
    """Where Prefect keeps results: a folder, or for a store at a URL a block of the server."""
    files = store()
    if files.remote is None:
        return files.root / RESULTS
    return _block(files.remote.url, str(PREFECT_API_URL.value()))


@functools.cache
def _block(url: str, _server: str) -> RemoteFileSystem:
    block = RemoteFileSystem(basepath=f"{url}/{RESULTS}")
    block.save(f"mta-{digest(url)[:12]}", overwrite=True, _sync=True)  # type: ignore[call-arg]
    return block


def _usable(storage: Path | RemoteFileSystem, key: str) -> bool | None:
    """Whether what Prefect kept under a key is a result whose files are as they were made.

    None where it kept nothing. Prefect reads a record as the record itself says: as a pickle, or as
    JSON whose `__class__` may be any function. Whoever can write to a shared store could run code
    here, so only plain JSON of one result passes.
    """
    named: list[Any] = []

    def note(fields: dict[str, Any]) -> dict[str, Any]:
        named.extend(fields[mark] for mark in ("__class__", "__exc_type__") if mark in fields)
        return fields

    try:
        if isinstance(storage, Path):
            record: Any = (storage / key).read_bytes()
        else:  # Prefect types its sync calls as "or a coroutine"
            record = storage.read_path(key, _sync=True)  # type: ignore[call-arg]
    except (ValueError, OSError):
        return None
    known = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in Result.__subclasses__()}
    try:
        whole = json.loads(record, object_hook=note)
        kept = json.loads(whole["result"], object_hook=note)
        if whole["metadata"]["serializer"] != JSONSerializer().model_dump() or len(named) != 1:
            return False
        result = known[kept["__class__"]].model_validate(kept["data"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    intact = all(map(store().intact, files_of(result)))
    if not intact:
        log(f"store: files of {key} are gone or damaged: it is made again", warning=True)
    return intact


def _may_pass(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a failed run is tried again: its error may be gone by then."""
    error = state.result(raise_on_failure=False)
    if not isinstance(error, BaseException) or transient(error):
        return isinstance(error, BaseException)
    if not isinstance(error, InputError) and not disk_full(error):
        # Prefect logs a traceback only of what was tried again.
        log("".join(traceback.format_exception(error)), warning=True)
    return False


def _failure(state: State[Any], name: str) -> Exception:
    """Why a run did not complete, as an exception whose message is one line."""
    error, data = state.result(raise_on_failure=False), state.data
    # Prefect stores the error as a result. It is none, and may name a user.
    key = getattr(getattr(data, "metadata", data), "storage_key", None)
    if key and not isinstance(error, StorageError):  # else it could not be written
        with suppress(StorageError):
            files = store()
            files.remove(files.root / RESULTS / PurePath(key).name)
    if isinstance(error, InputError):
        return StageFailed(str(error))
    if isinstance(error, BaseException) and (line := disk_full(error)):
        return DiskFull(line)
    message = " ".join((state.message or state.name or "no reason given").split())
    shown = message.removeprefix("Task run encountered an exception ")[:500]
    return StageFailed(f"{name}: {shown}")


@functools.cache
def _end_with_parent() -> None:
    """In a worker process: end when the process that started it is gone, even by SIGKILL.

    Else it would wait for another job for ever, with memory and a gpu slot.
    """
    if (parent := multiprocessing.parent_process()) is not None:

        def wait_and_exit() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=wait_and_exit, daemon=True).start()

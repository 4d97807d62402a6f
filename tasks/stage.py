"""What every stage's task shares: its state's name, its store, its GPU slot.

A stage function returns a `Piece`. `stage` makes it a Prefect task whose run is named `Cached` when
the piece was found in the store, and whose bad input ends it as Failed with one line and no
traceback. What may pass (a server that does not answer) is tried again after a while. `result_of`
runs one from the flow.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypedDict
from uuid import UUID

from prefect import Flow, State, Task, get_run_logger, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.context import FlowRunContext
from prefect.exceptions import MissingContextError, ObjectAlreadyExists, ObjectNotFound
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Completed, Crashed, Failed
from prefect.utilities.annotations import quote

from tasks.errors import InputError, masked
from tasks.running.faults import DELAYS, DISK_FULL, DiskFull, disk_full, transient
from tasks.store.artifacts import Store
from tasks.store.files import store_folder
from tasks.store.pieces import Piece, Ref

GPU_LIMIT = "gpu"
# Set in the environment of Ray's workers (tasks/running/ray_runner.py).
ON_RAY = "MTA_ON_RAY"
# The shortest lease Prefect grants: a slot whose holder was killed is free again after it.
SLOT_LEASE_SECONDS = 60
SETTLE_SECONDS = 0.1


class Result(TypedDict):
    """What a stage hands to the flow: small, JSON, no data."""

    ref: Ref
    value: dict[str, Any]
    notes: dict[str, Any]
    cached: bool


class StageFailed(Exception):
    """A stage did not give its piece; the message is one line."""


def log(line: str, warning: bool = False) -> None:
    """One line in the run's log; printed where there is no run (unit tests, scripts).

    Ids and counts, never texts of users; of URLs no password is shown.
    """
    line = masked(line)
    try:
        logger = get_run_logger()
    except MissingContextError:
        print(line)
    else:
        (logger.warning if warning else logger.info)(line)


def store() -> Store:
    """The store of this process: `MTA_STORE`, a folder or a URL; else `.mta/store` below here."""
    where = store_at(store_place())
    where.only_finds = _ONLY_FINDS.get()
    return where


def store_place() -> str:
    """Where the store is, for any process of any machine: a URL, or a whole path.

    Raises InputError for a `file://` without a whole path.
    """
    place = os.environ.get("MTA_STORE", ".mta/store")
    return str(store_folder(place) or place)


def store_at(place: str) -> Store:
    """The store in a folder (`file://` is one), or at an fsspec URL with its cache in
    `MTA_STORE_CACHE`.

    Raises InputError for a URL that nothing here can read.
    """
    warn = functools.partial(log, warning=True)
    if folder := store_folder(place):
        return Store(folder, warn)
    from tasks.store.remote import RemoteStore
    from tasks.store.storage import Storage

    cache = Path(os.environ.get("MTA_STORE_CACHE", ".mta/cache")).absolute()
    return RemoteStore(Storage(place), cache, warn)


# What a stage function gives: a piece, or one per member of its job; a member that failed is named.
Given = Piece | list[Piece | InputError]
# Whether stage functions are called only to see what they find.
_ONLY_FINDS: ContextVar[bool] = ContextVar("only_finds", default=False)
# What the job that is submitted was seen to find, so that it need not look again.
_FOUND: ContextVar[Given | None] = ContextVar("found", default=None)


def stage(
    uses_model: bool = False, **options: Any
) -> Callable[[Callable[..., Given]], Task[..., Any]]:
    """Decorator: a stage function as a Prefect task. `options` go to `prefect.task`.

    `uses_model` sends it to where models are run (tasks/running). Not one of Prefect's tags: a task
    that has any asks the server for slots of them before and after each run.

    The task's result is a `Result`, or a list of results and reasons (str) of what failed.
    """

    def decorate(function: Callable[..., Given]) -> Task[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> State[Any]:
            try:
                given = _seen() or function(*args, **kwargs)
            except Exception as error:
                if line := disk_full(error):
                    return Failed(name=DISK_FULL, message=line)
                if isinstance(error, InputError):
                    return Failed(message=str(error))
                raise
            several = given if isinstance(given, list) else [given]
            pieces = [item for item in several if isinstance(item, Piece)]
            if not pieces:
                return Failed(message="; ".join(map(str, several)))
            results = [_result(item) if isinstance(item, Piece) else str(item) for item in several]
            data = results if isinstance(given, list) else results[0]
            if all(piece.cached for piece in pieces):
                return Completed(name="Cached", message=f"found: {pieces[0].ref['uri']}", data=data)
            seconds = sum(piece.notes["seconds"] for piece in pieces if not piece.cached)
            return Completed(message=f"made in {seconds:.1f} s", data=data)

        # The store is the cache (see tasks/store); Prefect keeps nothing of the result.
        made = task(
            cache_policy=NO_CACHE, persist_result=False, retries=len(DELAYS),
            retry_delay_seconds=DELAYS, retry_jitter_factor=0.5, retry_condition_fn=_may_pass,
            **options,
        )  # fmt: skip
        wrapped = made(run)
        if uses_model:
            _USE_MODEL[wrapped.name] = function
        return wrapped

    return decorate


# The stages that run the base model: name -> what they do.
_USE_MODEL: dict[str, Callable[..., Given]] = {}


def uses_model(called: Task[..., Any]) -> bool:
    return called.name in _USE_MODEL


def _seen() -> Given | None:
    """What this job was seen to find when it was submitted.

    A function, because a stage is sent to other processes with the globals it names, and a
    ContextVar cannot be.
    """
    return _FOUND.get()


@contextmanager
def looked_up(called: Task[..., Any], arguments: dict[str, Any]) -> Iterator[bool]:
    """Whether all that a job of a stage that runs the model would give is in the store.

    If so, the job gives it when it is submitted inside: it runs no model and needs no process.
    """
    token = _ONLY_FINDS.set(True)
    try:
        given = _USE_MODEL[called.name](**unquoted(arguments))
    except Exception:
        # Nothing is made here (NotFound). Whatever else is wrong with the job, it says itself.
        given = None
    finally:
        _ONLY_FINDS.reset(token)
    found = _FOUND.set(given)
    try:
        yield given is not None
    finally:
        _FOUND.reset(found)


def _may_pass(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a failed run of a stage is tried again: where its error may be gone by then."""
    return isinstance(state.data, BaseException) and transient(state.data)


def _result(piece: Piece) -> Result:
    return Result(ref=piece.ref, value=piece.value, notes=piece.notes, cached=piece.cached)


def result_of(called: Task[..., Any] | Flow[..., Any], *arguments: Any) -> Any:
    """Run a stage as a job of this flow's runner, or a sub-flow with the same runner.

    Returns the result. Raises DiskFull where the disk takes no more, and StageFailed, one line,
    otherwise.
    """
    if isinstance(called, Flow):
        context = FlowRunContext.get()
        own: Any = called.with_options(task_runner=context.task_runner) if context else called
        # The end of a flow run waits for the thread that tells of its life, up to a second. That
        # the process lives the outer one tells.
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            state: State[Any] = own(*arguments, return_state=True)
    else:
        # Prefect would go through all of a config or a summary for futures, several times a job:
        # a tenth of a run that finds everything. There are none in them.
        state = state_of(called.submit(*map(quote, arguments)))
    if state.is_completed():
        return state.result()
    stop_if_full(state)
    raise StageFailed(reason(state, called.name))


def submit_each(
    called: Task[..., Any], shared: Iterable[Any], own: Iterable[Sequence[Any]]
) -> list[PrefectFuture[Any]]:
    """A job of a stage for each place in the lists `own`, its last arguments, after `shared`."""
    # Quoted as in `result_of`.
    return list(called.map(*(quote(unmapped(one)) for one in shared), *map(quote, own)))


def unquoted(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a job as its stage function takes them."""
    return {k: v.unwrap() if isinstance(v, quote) else v for k, v in arguments.items()}


def state_of(future: PrefectFuture[Any]) -> State[Any]:
    """How a job ended; a job whose process or machine was lost for good counts as crashed."""
    try:
        # Without `wait` the state would be asked of the server, which may not know the end yet.
        future.wait()
    except (BrokenExecutor, CancelledError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        return Crashed(message=f"its process was ended ({why}); start it again")
    except StageFailed:
        raise
    except Exception as error:
        # The job's own errors are in its state: Prefect could not begin it.
        why = " ".join(str(error).split())[:200]
        return Crashed(message=f"it could not be run ({type(error).__name__}: {why}); start again")
    return future.state


def stop_if_full(state: State[Any]) -> None:
    """Raises DiskFull for a state that ended for want of disk: no other stage would fare better."""
    if state.name == DISK_FULL:
        raise DiskFull(state.message)


def reason(state: State[Any], what: str) -> str:
    """Why a run did not complete, in one line."""
    message = " ".join((state.message or state.name or "no reason given").split())
    return masked(f"{what}: {message.removeprefix('Task run encountered an exception ')[:500]}")


def gpu_slots(otherwise: int = 1) -> int:
    """How many slots the `gpu` limit has; created with `otherwise` where the server has none."""
    with get_client(sync_client=True) as client:
        try:
            return client.read_global_concurrency_limit_by_name(GPU_LIMIT).limit
        except ObjectNotFound:
            with contextlib.suppress(ObjectAlreadyExists):
                client.create_global_concurrency_limit(
                    GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=otherwise)
                )
            return client.read_global_concurrency_limit_by_name(GPU_LIMIT).limit


def flow_run_is_over(flow_run_id: str) -> bool:
    """Whether a flow run has ended; one that the server does not know may live elsewhere."""
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(flow_run_id)).state
        except (ObjectNotFound, ValueError):
            return False
    return state is not None and state.is_final()


@contextmanager
def gpu_slot() -> Iterator[None]:
    """Hold one slot of the `gpu` limit. An absent limit is an error, never silently no limit.

    On Ray none is held: Ray gives a job the GPUs it asks for.
    """
    if os.environ.get(ON_RAY):
        yield
        return
    # The server is just writing down that this task runs, and sqlite turns a second writer away:
    # the client would then wait two seconds before it asks again.
    time.sleep(SETTLE_SECONDS)
    slot = concurrency(
        GPU_LIMIT, occupy=1, lease_duration=SLOT_LEASE_SECONDS, strict=True,
        # Losing the server for a moment must not throw away an hour of training.
        raise_on_lease_renewal_failure=False,
    )  # fmt: skip
    slot.__enter__()
    try:
        yield
    finally:
        try:
            slot.__exit__(None, None, None)
        except Exception as error:
            # Nor must it when the work is done.
            log(
                f"the {GPU_LIMIT} slot could not be given back ({type(error).__name__}): "
                f"it is free when its lease of {SLOT_LEASE_SECONDS} s ends",
                warning=True,
            )

"""Jobs side by side: batches of them, their results, and lines of what is missing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, TypeVar

from prefect import State
from prefect.states import Completed, Failed

from tasks.errors import InputError, label
from tasks.log import log
from tasks.record import Result
from tasks.results.stage import Job
from tasks.running.progress import Progress

# What a job is about: the anchors, or a method and the number of a batch.
Piece = TypeVar("Piece", bound=tuple[object, ...])
R = TypeVar("R", bound=Result)
A = TypeVar("A")
T = TypeVar("T")


def batches_of(everything: tuple[T, ...], size: int) -> list[tuple[T, ...]]:
    """`size` at a time."""
    return [everything[start : start + size] for start in range(0, len(everything), size)]


@contextmanager
def noted(what: str, missing: list[str]) -> Iterator[None]:
    """Name `what` in `missing` if the block fails by InputError; the rest goes on."""
    try:
        yield
    except InputError as error:
        missing.append(f"{what}: {error}")
        log(f"missing: {missing[-1]}", warning=True)


def collected(
    jobs: Mapping[Piece, Job[R]], kind: str, title: str, missing: list[str]
) -> dict[Piece, R]:
    """The results of jobs, by what they are about; those that failed are named in `missing`.

    Raises DiskFull as soon as one ended for want of disk.
    """
    progress = Progress("jobs", title, len(jobs))
    results: dict[Piece, R] = {}
    for about, job in jobs.items():
        with noted(piece(kind, about), missing):
            results[about] = job.result()
        progress.advance()
    return results


def piece(kind: str, about: tuple[object, ...]) -> str:
    """A job's name: `anchor a b`, `answers of mta 0`."""
    return " ".join([kind, *(label(str(one)) for one in about)])


def ended(done: str, missing: Sequence[str], late: str = "") -> State[Any]:
    """How a flow ended: `Completed`, or failed as `Incomplete`. late: what is said beside it."""
    if not missing:
        return Completed(message=done + late)
    text = f"{done}; {len(missing)} missing: {'; '.join(missing)}"[:1000]
    return Failed(name="Incomplete", message=text + late)


def in_threads(function: Callable[[A], T], arguments: Sequence[A], threads: int) -> list[T]:
    """The function's result for each argument, so many at once; the first error ends them all."""
    with ThreadPoolExecutor(threads, thread_name_prefix="cell") as pool:
        # Prefect keeps what flow run this is, and the log, in the context.
        futures = [pool.submit(copy_context().run, function, one) for one in arguments]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise

"""How a dry run replaces a run's work: a planner (tasks/plan) stands in for every stage, and for
the `plannable` functions, which look at models or at results."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
# From a function's name to what is called in its place; None: the function itself.
Planner = Callable[[str], Callable[..., Any] | None]
PLANNER: ContextVar[Planner] = ContextVar("planner", default=lambda _: None)


@contextmanager
def planned_by(planner: Planner) -> Iterator[None]:
    """Inside, what the planner gives is called in place of stages and plannable functions."""
    token = PLANNER.set(planner)
    try:
        yield
    finally:
        PLANNER.reset(token)


def plannable(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: a planner may stand in for the function."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return (PLANNER.get()(function.__name__) or function)(*args, **kwargs)

    return call

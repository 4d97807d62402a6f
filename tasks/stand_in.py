"""What a plan does in place of a run's work (`dry_run`, tasks/plan).

A planner tells by a function's name what is called in its place, for every stage, and for functions
that are marked `plannable` since they look at models or at results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Planner = Callable[[str], Callable[..., Any] | None]
_PLANNER: ContextVar[Planner | None] = ContextVar("planner", default=None)


@contextmanager
def planned_by(planner: Planner) -> Iterator[None]:
    """Inside, what the planner gives is called in place of stages and plannable functions."""
    token = _PLANNER.set(planner)
    try:
        yield
    finally:
        _PLANNER.reset(token)


def stand_in(name: str) -> Callable[..., Any] | None:
    """What is called in place of the function of this name; None where it is itself."""
    planner = _PLANNER.get()
    return planner(name) if planner else None


def plannable(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: a planner may stand in for the function."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        planned = stand_in(function.__name__)
        return planned(*args, **kwargs) if planned else function(*args, **kwargs)

    return call

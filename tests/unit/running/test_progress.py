"""Progress is shown of work that lasts, and never fails it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.running import progress as progress_module
from tasks.running.progress import SHOWN_AFTER, Progress

RUN: ContextVar[str] = ContextVar("run", default="none")


class Server:
    """What would go to the Prefect server, and a clock and timers that a test moves by hand."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, ...]] = []
        self.timers: list[Timer] = []
        self.now = 100.0
        self.error: Exception | None = None

    def create(self, percent: float, key: str, description: str) -> str:
        self.sent.append(("create", percent, key, description, RUN.get()))
        if self.error:
            raise self.error
        return "artifact"

    def update(self, artifact: str, percent: float, description: str) -> None:
        self.sent.append(("update", artifact, percent, description))
        if self.error:
            raise self.error

    def timer(self, seconds: float, call: Callable[..., None], given: list[Any]) -> Timer:
        self.timers.append(Timer(seconds, call, given))
        return self.timers[-1]


class Timer:
    def __init__(self, seconds: float, call: Callable[..., None], given: list[Any]) -> None:
        self.seconds, self._call, self._given = seconds, call, given
        self.daemon = self.started = self.cancelled = False

    def start(self) -> None:
        self.started = True

    def cancel(self) -> None:
        self.cancelled = True

    def fire(self) -> None:
        self._call(*self._given)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    fake = Server()
    monkeypatch.setattr(progress_module, "create_progress_artifact", fake.create)
    monkeypatch.setattr(progress_module, "update_progress_artifact", fake.update)
    monkeypatch.setattr(progress_module.threading, "Timer", fake.timer)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: fake.now)
    monkeypatch.setattr(progress_module, "FlowRunContext", SimpleNamespace(get=object))
    return fake


def test_work_that_lasts_is_shown_and_moves_once_a_second(server: Server) -> None:
    token = RUN.set("of the work")
    work = Progress("embed", "LaMP-1: users", 4)
    RUN.reset(token)
    (timer,) = server.timers
    assert (timer.seconds, timer.started, timer.daemon) == (SHOWN_AFTER, True, True)
    work.advance()
    assert server.sent == []
    timer.fire()
    # In the context of the run that the work is of, as far as it has come.
    first = ("create", 25.0, "embed-lamp-1-users", "LaMP-1: users: 1 of 4", "of the work")
    assert server.sent == [first]
    server.now += 0.9
    work.advance()
    assert server.sent == [first]
    server.now += 0.2
    work.advance()
    work.advance()
    # The end is shown whenever it comes.
    assert server.sent[1:] == [
        ("update", "artifact", 75.0, "LaMP-1: users: 3 of 4"),
        ("update", "artifact", 100.0, "LaMP-1: users: 4 of 4"),
    ]


def test_work_that_is_over_at_once_costs_no_request(server: Server) -> None:
    work = Progress("jobs", "LaMP-1: mta, training", 2)
    work.advance()
    work.advance()
    assert server.timers[0].cancelled
    server.timers[0].fire()  # it may be under way when it is cancelled
    assert server.sent == []


def test_work_outside_a_run_is_not_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "FlowRunContext", SimpleNamespace(get=lambda: None))
    work = Progress("jobs", "LaMP-1: mta, training", 2)
    server.timers[0].fire()
    work.update(2)
    assert server.sent == []


def test_work_that_failed_before_it_was_shown_is_not_shown_after(server: Server) -> None:
    def fails() -> None:
        work = Progress("jobs", "LaMP-1: mta, training", 2)
        work.advance()
        raise ValueError("out of luck")

    with pytest.raises(ValueError, match="out of luck"):
        fails()
    gc.collect()
    server.timers[0].fire()
    assert server.sent == []


def test_a_server_that_does_not_answer_costs_a_line(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.error = ConnectionError("no")
    work = Progress("jobs", "training", 2)
    server.timers[0].fire()
    work.update(2)
    assert [line[0] for line in server.sent] == ["create"]
    assert capsys.readouterr().out == "progress of training cannot be shown (ConnectionError)\n"
    server.error = None
    work = Progress("jobs", "training", 2)
    server.timers[1].fire()
    server.error = ConnectionError("no")
    work.update(2)
    assert [line[0] for line in server.sent] == ["create", "create", "update"]
    assert capsys.readouterr().out == "progress of training cannot be shown (ConnectionError)\n"


def test_a_timer_that_cannot_start_costs_a_line(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_self: Timer) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Timer, "start", start)
    work = Progress("jobs", "training", 1)
    work.advance()
    assert work.done == 1
    assert capsys.readouterr().out == "progress of training cannot be shown (RuntimeError)\n"

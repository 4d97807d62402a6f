"""Progress is shown of work that lasts, and never fails it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tasks.running import progress as progress_module
from tasks.running.progress import PAUSE_SECONDS, Progress


class Server:
    """What would go to the Prefect server, and a clock that a test moves by hand."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, ...]] = []
        self.now = 100.0
        self.error: Exception | None = None

    def create(self, percent: float, key: str, description: str) -> str:
        self.sent.append(("create", percent, key, description))
        if self.error:
            raise self.error
        return "artifact"

    def update(self, artifact: str, percent: float, description: str) -> None:
        self.sent.append(("update", artifact, percent, description))
        if self.error:
            raise self.error


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    fake = Server()
    monkeypatch.setattr(progress_module, "create_progress_artifact", fake.create)
    monkeypatch.setattr(progress_module, "update_progress_artifact", fake.update)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: fake.now)
    monkeypatch.setattr(progress_module, "FlowRunContext", SimpleNamespace(get=object))
    return fake


def test_work_that_lasts_is_shown_and_moves_once_a_second(server: Server) -> None:
    work = Progress("embed", "LaMP-1: users", 5)
    server.now += 0.9
    work.advance()
    assert server.sent == []
    server.now += 0.2
    work.advance()
    first = ("create", 40.0, "embed-lamp-1-users", "LaMP-1: users: 2 of 5")
    assert server.sent == [first]
    server.now += 0.9
    work.advance()
    assert server.sent == [first]
    server.now += 0.2
    work.advance()
    work.advance()
    # The end is shown whenever it comes.
    assert server.sent[1:] == [
        ("update", "artifact", 80.0, "LaMP-1: users: 4 of 5"),
        ("update", "artifact", 100.0, "LaMP-1: users: 5 of 5"),
    ]


def test_work_that_is_over_at_once_costs_no_request(server: Server) -> None:
    work = Progress("jobs", "LaMP-1: mta, training", 2)
    work.advance()
    work.advance()
    assert server.sent == []


def test_work_outside_a_run_is_not_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "FlowRunContext", SimpleNamespace(get=lambda: None))
    work = Progress("jobs", "LaMP-1: mta, training", 3)
    for _ in range(3):
        server.now += PAUSE_SECONDS
        work.advance()
    assert server.sent == []


def test_a_server_that_does_not_answer_costs_a_line(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.error = ConnectionError("no")
    work = Progress("jobs", "training", 3)
    server.now += PAUSE_SECONDS
    work.update(1)
    assert [line[0] for line in server.sent] == ["create"]
    assert capsys.readouterr().out == "progress of training cannot be shown (ConnectionError)\n"
    server.error = None
    server.now += PAUSE_SECONDS
    work.update(2)
    server.error = ConnectionError("no")
    work.update(3)
    assert [line[0] for line in server.sent] == ["create", "create", "update"]
    assert capsys.readouterr().out == "progress of training cannot be shown (ConnectionError)\n"

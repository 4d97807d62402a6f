"""What the stack asks of the Prefect server: with patience; the slots of its limit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from infra.local import server
from infra.local.server import PrefectApi, ensure_pool_and_limit
from infra.local.settings import StackError


class Busy(BaseHTTPRequestHandler):
    """Says 503 as Prefect does while its sqlite is locked, then answers."""

    refusals = 0

    def do_GET(self) -> None:
        cls = type(self)
        cls.refusals -= 1
        body = b'{"exception_message":"Service Unavailable"}' if cls.refusals >= 0 else b'{"a": 1}'
        self.send_response(503 if cls.refusals >= 0 else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def busy() -> Iterator[PrefectApi]:
    with HTTPServer(("127.0.0.1", 0), Busy) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield PrefectApi(f"http://127.0.0.1:{http.server_address[1]}")
        http.shutdown()


def test_a_busy_server_is_asked_again(busy: PrefectApi) -> None:
    Busy.refusals = 1
    assert busy.call("GET", "/x") == {"a": 1}


def test_one_that_stays_busy_is_named(busy: PrefectApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BUSY_SECONDS", -1.0)
    Busy.refusals = 5
    with pytest.raises(StackError, match="503"):
        busy.call("GET", "/x")
    assert Busy.refusals == 4


class LimitApi(PrefectApi):
    """A server that knows of the limit `there`, or of none; `calls` has what it was told of it."""

    there: dict[str, Any] | None
    calls: list[Any]

    def call(self, method: str, path: str, body: Any = None) -> Any:
        if method == "GET":
            return self.there
        if not path.startswith("/work_pools/"):
            self.calls.append((method, body))
        return None


@pytest.mark.parametrize(
    ("slots", "there", "calls"),
    [
        # Without a word of the user the flow makes the limit, and one that is there stays.
        (0, None, []),
        (0, {"limit": 1}, []),
        (1, None, [("POST", {"name": "gpu", "limit": 1})]),
        (2, {"limit": 1}, [("PATCH", {"limit": 2})]),
    ],
)
def test_slots(slots: int, there: Any, calls: list[Any]) -> None:
    api = LimitApi("http://nowhere/api")
    object.__setattr__(api, "there", there)
    object.__setattr__(api, "calls", [])
    ensure_pool_and_limit(api, slots)
    assert api.calls == calls

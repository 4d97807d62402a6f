"""Calls to a server that is too busy for a moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from infra.local import api
from infra.local.api import PrefectApi
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
    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield PrefectApi(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()


def test_a_busy_server_is_asked_again(busy: PrefectApi) -> None:
    Busy.refusals = 1
    assert busy.call("GET", "/x") == {"a": 1}


def test_one_that_stays_busy_is_named(busy: PrefectApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "BUSY_SECONDS", -1.0)
    Busy.refusals = 5
    with pytest.raises(StackError, match="503"):
        busy.call("GET", "/x")
    assert Busy.refusals == 4

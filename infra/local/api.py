"""The few calls to the Prefect server's REST API that the stack needs.

Not run by itself. Plain `urllib` instead of Prefect's client: importing that takes two seconds,
which every command of the stack would pay.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from infra.local.settings import StackError

# Never through a proxy: the servers are on this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
PAGE = 200  # the most rows the server returns at once
BUSY_SECONDS = 30.0  # how long a server may say that it is too busy


def answers(url: str, *, timeout: float = 2.0) -> bool:
    """Whether a GET of `url` is answered with 200."""
    try:
        with _OPENER.open(url, timeout=timeout) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@dataclass
class PrefectApi:
    """`url` ends in `/api`."""

    url: str

    def healthy(self) -> bool:
        return answers(f"{self.url}/health")

    def call(self, method: str, path: str, body: object = None) -> Any:
        """The reply's JSON; None where the server says 404 or sends nothing."""
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            text = self._sent(request)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            detail = error.read()[:300].decode(errors="replace")
            raise StackError(f"Prefect refused {method} {path}: {error.code} {detail}") from None
        except OSError as error:
            raise StackError(f"Prefect at {self.url} does not answer: {error}") from None
        return json.loads(text) if text else None

    def _sent(self, request: urllib.request.Request) -> bytes:
        """The reply's body; a server that is too busy (503: sqlite is locked) is asked again."""
        limit = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                with _OPENER.open(request, timeout=30) as reply:
                    return bytes(reply.read())
            except urllib.error.HTTPError as error:
                if error.code != 503 or time.monotonic() > limit:
                    raise
            time.sleep(1)

    def everything(self, path: str, where: dict[str, object]) -> list[dict[str, Any]]:
        """All rows of a `/filter` route, page by page."""
        rows: list[dict[str, Any]] = []
        while True:
            page = self.call("POST", path, {**where, "limit": PAGE, "offset": len(rows)}) or []
            rows += page
            if len(page) < PAGE:
                return rows

"""A small site on 127.0.0.1 that serves files as the benchmark's does, or fails as it is told."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep
from typing import Any

import httpx

HTML = b"<!DOCTYPE html>\n<html><body>CIIR: page not found</body></html>\n" * 300


@dataclass
class Answer:
    """How one request is answered; what is not set is as a plain file server does it.

    body: instead of the file's. cut: bytes of the body after which the connection breaks.
    wait: seconds before each 64 KiB. headers: replace those of the same name; None leaves one out.
    ranges: whether a `Range` of the request is heeded.
    """

    status: int = 200
    body: bytes | None = None
    cut: int | None = None
    wait: float = 0.0
    headers: dict[str, str | None] = field(default_factory=dict)
    ranges: bool = True


class Site(ThreadingHTTPServer):
    """files: path -> content. answers: path -> how the next requests for it are answered.

    asked: (path, headers) of every request, in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, deque[Answer]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/LaMP"

    def then(self, path: str, *answers: Answer) -> None:
        self.answers.setdefault(path, deque()).extend(answers)

    def ranges(self, path: str) -> list[str | None]:
        """The `Range` of each request for `path`."""
        return [headers.get("range") for asked, headers in self.asked if asked == path]

    def handle_error(self, *_about: Any) -> None:
        """A client that goes away in the middle is what some tests are about."""


@contextlib.contextmanager
def serving(site: ThreadingHTTPServer) -> Iterator[None]:
    thread = threading.Thread(target=site.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        site.shutdown()
        site.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Site

    def do_GET(self) -> None:
        self.server.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        queue = self.server.answers.get(self.path)
        answer = queue.popleft() if queue else Answer()
        content = self.server.files.get(self.path)
        if answer.body is None and content is None:
            answer = Answer(404, HTML)
        body = content if answer.body is None else answer.body
        assert body is not None
        tag = f'"{hashlib.md5(body).hexdigest()}"'
        headers: dict[str, str | None] = {"ETag": tag, "Content-Type": "application/json"}
        status = answer.status
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and answer.ranges and self.headers.get("If-Range") == tag:
            start = int(wanted[1])
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body = body[start:]
        headers |= {"Content-Length": str(len(body))} | answer.headers
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self._send(body[: answer.cut], answer.wait)
        self.close_connection = answer.cut is not None or headers["Content-Length"] != str(
            len(body)
        )

    def _send(self, body: bytes, wait: float) -> None:
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(body), 1 << 16):
                if wait:
                    sleep(wait)
                self.wfile.write(body[start : start + (1 << 16)])

    def log_message(self, *_about: Any) -> None:
        """Quiet."""


class Proxy(ThreadingHTTPServer):
    """A proxy that sends every request for `host` to `site`, and notes what it was asked for."""

    daemon_threads = True

    def __init__(self, site: Site, host: str) -> None:
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.site, self.host = site, host
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _ProxyHandler(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        # A proxy is given the whole address, not a path.
        self.server.asked.append(self.path)
        assert self.path.startswith(f"http://{self.server.host}/LaMP")
        there = self.server.site.url + self.path.removeprefix(f"http://{self.server.host}/LaMP")
        answer = httpx.get(there, trust_env=False)
        self.send_response(answer.status_code)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, *_about: Any) -> None:
        """Quiet."""


def official(users: int = 12, items: int = 3, filler: int = 0) -> tuple[bytes, bytes]:
    """Questions and outputs of LaMP-2M in the official shape; no two users share an item.

    filler: characters added to each description, so that it takes a while to come.
    """
    tags = ("comedy", "sci-fi", "violence")
    questions, golds = [], []
    for user in range(users):
        about = [
            {
                "id": f"{user}{item}",
                "tag": tags[user % 3],
                "description": f"film {item} of {user} " + "x" * filler,
            }
            for item in range(items)
        ]
        text = f"Which tag does this movie relate to? description: a new film of {user}"
        questions.append({"id": f"2{user}", "input": text, "profile": about})
        golds.append({"id": f"2{user}", "output": tags[user % 3]})
    outputs = {"task": "LaMP_2", "golds": golds}
    return json.dumps(questions).encode(), json.dumps(outputs).encode()

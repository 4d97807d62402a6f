"""Full disks and proxies."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from tasks.lamp import download
from tests.unit.lamp.download.case import OUTPUTS, QUESTIONS, refused, whole
from tests.unit.lamp.web import Answer, Proxy, Site, serving


class FullDisk(io.BufferedWriter):
    """Takes 700,000 bytes; then the disk is full."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 700_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_the_disk_fills_up_on_the_way(
    get: Any, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Path.open

    def full(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if mode == "ab":
            return FullDisk(io.FileIO(self, "ab"))
        return plain(self, mode, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        refused(get, "LaMP_2/new/dev", "No space left", "lamp.cache")
    assert len(site.asked) == 1
    # With space again, it goes on from there.
    whole(get())
    assert site.ranges(QUESTIONS) == [None, f"bytes={2 * download.CHUNK_BYTES}-"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_the_kernel_says_that_the_disk_is_full(get: Any, tmp_path: Path) -> None:
    """Writing to /dev/full gives a true ENOSPC."""
    folder = tmp_path / "cache/LaMP_2/new/dev"
    folder.mkdir(parents=True)
    (folder / "dev_questions.json.part").symlink_to("/dev/full")
    refused(get, "LaMP_2/new/dev", "No space left", "lamp.cache")


def test_a_proxy_of_the_environment_is_used(
    get: Any, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host exists for the proxy alone, so nothing can have come past it."""
    with serving(proxy := Proxy(site, "lamp.invalid")):
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        whole(get(url="http://lamp.invalid/LaMP"))
        assert proxy.asked == [f"http://lamp.invalid{path}" for path in (QUESTIONS, OUTPUTS)]


def test_no_proxy_is_heeded(get: Any, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    whole(get())


@pytest.mark.parametrize("proxy", ["foo://127.0.0.1:1", "http://127.0.0.1:port"])
def test_a_proxy_that_makes_no_sense_is_named(
    get: Any, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    refused(get, "InvalidURL", "HTTP_PROXY")


SECRET = "hunter2"


def test_a_mirrors_password_comes_from_netrc(
    get: Any, site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Basic authentication of user "me" (RFC 7617: base64 of `user:password`), for that host."""
    file = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(file))
    for host, wanted in (("mirror.example", None), ("127.0.0.1", "Basic bWU6aHVudGVyMg==")):
        file.write_text(f"machine {host} login me password {SECRET}\n")
        get(cache=str(tmp_path / host))
        assert site.asked[-1][1].get("authorization") == wanted


def test_a_broken_netrc_is_not_quoted(
    get: Any, site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "netrc"
    file.write_text(f"machine 127.0.0.1 login me\npasswort {SECRET}\n")
    monkeypatch.setenv("NETRC", str(file))
    site.then(QUESTIONS, Answer(401, b""))
    assert SECRET not in refused(get, "HTTP 401")
    assert not any(SECRET in line for line in get.said)

"""What servers answer: what is tried again, what is not, and how it is said."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import InputError
from tasks.lamp.download import official_files, transfer
from tasks.options import LampOptions
from tests.unit.lamp.download.case import BIG, QUESTIONS, refused, whole
from tests.unit.lamp.web import HTML, Answer, Site, serving


def test_a_web_page_with_status_200_is_named(get: Any, site: Site, tmp_path: Path) -> None:
    site.then(QUESTIONS, Answer(body=HTML, headers={"Content-Type": "text/html"}))
    refused(get, site.url + QUESTIONS.removeprefix("/LaMP"), "web page instead of JSON")
    assert len(site.asked) == 1  # a wrong address stays wrong
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".json", ".part")]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\x1f\x8b\x08" + b"0" * 99, "is compressed"),
        (b'{"error": "no"}', 'starts with \'{"error": "no"}\', not ['),
        (BIG[:-1], "does not end with ], so it is cut off"),
    ],
    ids=["empty", "blank", "gzip", "object", "cut"],
)
def test_what_is_not_the_files_json_is_named(
    get: Any, site: Site, tmp_path: Path, body: bytes, words: str
) -> None:
    site.then(QUESTIONS, Answer(body=body))
    refused(get, QUESTIONS.removeprefix("/LaMP"), words)
    assert len(site.asked) == 1
    assert not (tmp_path / "cache/LaMP_2/new/dev/dev_questions.json").exists()
    whole(get())


def test_a_byte_order_mark_is_no_fault(get: Any, site: Site) -> None:
    site.files[QUESTIONS] = b"\xef\xbb\xbf\n" + BIG + b"\n"
    assert (get() / "dev_questions.json").read_bytes() == site.files[QUESTIONS]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_what_will_not_pass_is_not_tried_again(
    get: Any, site: Site, no_pauses: list[float], status: int
) -> None:
    site.then(QUESTIONS, Answer(status, HTML))
    refused(get, f"HTTP {status}", "lamp.url=<mirror>")
    assert len(site.asked) == 1
    assert no_pauses == []


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_what_may_pass_is_tried_again(
    get: Any, site: Site, no_pauses: list[float], status: int
) -> None:
    site.then(QUESTIONS, Answer(status, b"busy"), Answer(status, b"busy"))
    whole(get())
    assert no_pauses == [1.0, 2.0]


def test_the_server_says_how_long_to_wait(get: Any, site: Site, no_pauses: list[float]) -> None:
    """No longer than a minute, though."""
    site.then(QUESTIONS, Answer(503, b"", headers={"Retry-After": "7"}))
    site.then(QUESTIONS, Answer(503, b"", headers={"Retry-After": "3600"}))
    whole(get())
    assert no_pauses == [7.0, 60.0]


def test_a_server_that_is_not_there(get: Any, no_pauses: list[float]) -> None:
    with serving(gone := Site()):
        url = gone.url
    refused(get, url, "ConnectError", "data=<folder>", "lamp.url=<mirror>", url=url)
    assert no_pauses == [1.0, 2.0, 4.0, 8.0]


def test_a_server_that_falls_silent(get: Any, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "TIMEOUT_SECONDS", 0.2)
    quiet = threading.Event()
    monkeypatch.setattr("tests.unit.lamp.web.sleep", lambda _: quiet.wait(2))
    site.then(QUESTIONS, Answer(wait=1.0))
    whole(get())
    quiet.set()
    assert any("ReadTimeout" in line for line in get.said)


@pytest.mark.parametrize("more", [1000, -1000])
def test_a_wrong_length(get: Any, site: Site, more: int) -> None:
    """Too long: it never comes to an end. Too short: its end is not that of JSON."""
    answers = [Answer(headers={"Content-Length": str(len(BIG) + more)}) for _ in range(5)]
    site.then(QUESTIONS, *answers)
    if more > 0:
        refused(get, "tries")
    else:
        refused(get, "does not end with ]")
        assert len(site.asked) == 1


def test_redirects_are_followed_a_while(get: Any, site: Site) -> None:
    site.then(QUESTIONS, Answer(302, b"", headers={"Location": f"{site.url}/moved"}))
    site.files["/LaMP/moved"] = BIG
    whole(get())
    loop = Answer(302, b"", headers={"Location": site.url + "/LaMP_3/dev/dev_questions.json"})
    site.then("/LaMP/LaMP_3/dev/dev_questions.json", *[loop] * 30)
    options = LampOptions(url=site.url, cache=str(get().parent))
    with pytest.raises(InputError, match="redirects"):
        official_files("LaMP-3", options, print, lambda *_: None)

"""What servers answer: what is tried again, what is not, and how it is said."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import InputError
from tasks.lamp import download
from tasks.lamp.options import LampOptions
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
        (b"", "starts with nothing"),
        (b" \n", "starts with nothing"),
        (b"\x1f\x8b\x08" + b"0" * 99, "plain JSON is needed"),
        (b'{"error": "no"}', 'starts with \'{"error": "no"}\', not ['),
        (HTML, "web page instead of JSON"),
        (BIG[:-1], "is cut off: it ends without ]"),
    ],
    ids=["empty", "blank", "gzip", "object", "page", "cut"],
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
    assert no_pauses == [1, 2]


def test_a_server_that_is_not_there(get: Any, no_pauses: list[float]) -> None:
    with serving(gone := Site()):
        url = gone.url
    refused(get, url, "ConnectionError", "data=<folder", "lamp.url=<mirror>", url=url)
    assert no_pauses == [1, 2, 3, 4, 5, 6]


def test_a_server_that_falls_silent(get: Any, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    quiet = threading.Event()
    monkeypatch.setattr("tests.unit.lamp.web.sleep", lambda _: quiet.wait(2))
    site.then(QUESTIONS, Answer(wait=1.0))
    whole(get())
    quiet.set()
    assert any("Read timed out" in line for line in get.said)


@pytest.mark.parametrize("more", [1000, -1000])
def test_a_wrong_length(get: Any, site: Site, more: int) -> None:
    """Too long: it never comes to an end. Too short: its end is not that of JSON."""
    answers = [Answer(headers={"Content-Length": str(len(BIG) + more)}) for _ in range(7)]
    site.then(QUESTIONS, *answers)
    if more > 0:
        refused(get, "IncompleteRead")
        assert len(site.asked) == 1 + download.RETRIES
    else:
        refused(get, "is cut off")
        assert len(site.asked) == 1


def test_redirects_are_followed_a_while(get: Any, site: Site) -> None:
    site.then(QUESTIONS, Answer(302, b"", headers={"Location": f"{site.url}/moved"}))
    site.files["/LaMP/moved"] = BIG
    whole(get())
    loop = Answer(302, b"", headers={"Location": site.url + "/LaMP_3/dev/dev_questions.json"})
    site.then("/LaMP/LaMP_3/dev/dev_questions.json", *[loop] * 31 * (1 + download.RETRIES))
    options = LampOptions(url=site.url, cache=str(get().parent))
    with pytest.raises(InputError, match="redirects"):
        download.official_files("LaMP-3", options, print, lambda *_: None)

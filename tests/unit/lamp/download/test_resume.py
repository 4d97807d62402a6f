"""A broken transfer goes on, and never mixes two versions of a file."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from tasks.lamp import download
from tests.unit.lamp.download.case import BIG, OTHER, OUTPUTS, QUESTIONS, refused, whole
from tests.unit.lamp.web import HTML, Answer, Site, serving


@pytest.mark.parametrize("ranges", [True, False], ids=["range-heeded", "range-ignored"])
def test_a_broken_transfer_goes_on(
    get: Any, site: Site, no_pauses: list[float], ranges: bool
) -> None:
    """The connection breaks at byte 1,200,000; what came in whole chunks is not asked for again."""
    site.then(QUESTIONS, Answer(cut=1_200_000), Answer(ranges=ranges))
    whole(get())
    kept = 1_200_000 // download.CHUNK_BYTES * download.CHUNK_BYTES
    assert site.ranges(QUESTIONS) == [None, f"bytes={kept}-"]
    assert no_pauses == [1]
    assert any(f"from byte {kept:,}" in line for line in get.said)


def test_a_later_run_goes_on_where_an_earlier_one_gave_up(get: Any, site: Site) -> None:
    """Two breaks with new bytes, then none: the first run gives up."""
    cuts = [600_000, 600_000, *[0] * (download.RETRIES - 1)]
    site.then(QUESTIONS, *(Answer(cut=cut) for cut in cuts))
    refused(get, site.url, "ChunkedEncodingError", "data=<folder", "lamp.url=<mirror>")
    assert len(site.asked) == 1 + download.RETRIES
    whole(get())
    kept = 2 * (600_000 // download.CHUNK_BYTES) * download.CHUNK_BYTES
    assert site.ranges(QUESTIONS)[-1] == f"bytes={kept}-"


def test_the_file_changed_between_part_and_rest(get: Any, site: Site) -> None:
    """`If-Range` has the old ETag, so the site sends all of the new file; nothing is mixed."""
    site.then(QUESTIONS, Answer(cut=1_200_000))
    site.then(QUESTIONS, *[Answer(500, b"down")] * download.RETRIES)
    refused(get, "500 Server Error")
    site.files[QUESTIONS] = OTHER
    folder = get()
    assert (folder / "dev_questions.json").read_bytes() == OTHER
    assert site.asked[-2][1]["if-range"] == f'"{hashlib.md5(BIG).hexdigest()}"'


def test_a_part_from_another_address_is_not_built_upon(get: Any, site: Site) -> None:
    site.then(QUESTIONS, Answer(cut=1_200_000), *[Answer(503, b"")] * download.RETRIES)
    refused(get, "503 Server Error")
    with serving(mirror := Site()):
        mirror.files = {path: site.files[path] for path in (QUESTIONS, OUTPUTS)}
        whole(get(url=mirror.url))
        assert mirror.ranges(QUESTIONS) == [None]


@pytest.mark.parametrize("tag", [None, 'W/"1"'], ids=["no-mark", "weak"])
def test_without_a_strong_mark_it_starts_again(get: Any, site: Site, tag: str | None) -> None:
    """What cannot be named in If-Range cannot be gone on with safely."""
    site.then(QUESTIONS, Answer(cut=1_200_000, headers={"ETag": tag}))
    whole(get())
    assert site.ranges(QUESTIONS) == [None, None]


def test_a_date_is_a_mark_too(get: Any, site: Site) -> None:
    date = "Wed, 01 Jun 2022 10:00:00 GMT"
    site.then(QUESTIONS, Answer(cut=1_200_000, headers={"ETag": None, "Last-Modified": date}))
    whole(get())
    assert site.asked[1][1]["if-range"] == date


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Range": f"bytes 0-{len(BIG) - 1}/{len(BIG)}"},
        {"Content-Range": None},
        {"ETag": '"another"'},
    ],
    ids=["start", "none", "mark"],
)
def test_a_wrong_range_is_not_appended(
    get: Any, site: Site, headers: dict[str, str | None]
) -> None:
    site.then(QUESTIONS, Answer(cut=1_200_000), Answer(headers=headers))
    whole(get())
    assert site.ranges(QUESTIONS) == [None, "bytes=1048576-", None]


def test_a_range_that_cannot_be_is_started_again(get: Any, site: Site) -> None:
    site.then(QUESTIONS, Answer(cut=1_200_000), Answer(416, b""))
    whole(get())
    assert site.ranges(QUESTIONS) == [None, "bytes=1048576-", None]


def test_a_web_page_does_not_cost_what_has_come(get: Any, site: Site) -> None:
    """A captive portal, say: the part is still there for the next run."""
    page = Answer(body=HTML, headers={"Content-Type": "text/html"})
    site.then(QUESTIONS, Answer(cut=1_200_000), page)
    refused(get, "web page")
    whole(get())
    assert site.ranges(QUESTIONS)[-1] == "bytes=1048576-"


def test_no_length_at_all(get: Any, site: Site) -> None:
    """The end is where the connection closes: what breaks off there is cut off."""
    without = {"Content-Length": None, "Connection": "close"}
    site.then(QUESTIONS, Answer(headers=without, cut=1_200_000), Answer(headers=without))
    refused(get, "is cut off: it ends without ]")
    whole(get())
    assert get.shown[0] == ("dev_questions.json", download.CHUNK_BYTES, None)

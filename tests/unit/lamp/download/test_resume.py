"""A broken transfer goes on, and never mixes two versions of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tasks.lamp.download import transfer
from tests.unit.lamp.download.case import BIG, OTHER, OUTPUTS, QUESTIONS, refused, whole
from tests.unit.lamp.web import HTML, Answer, Site, serving


@pytest.mark.parametrize("ranges", [True, False], ids=["range-heeded", "range-ignored"])
def test_a_broken_transfer_goes_on(
    get: Any, site: Site, no_pauses: list[float], ranges: bool
) -> None:
    """The connection breaks at byte 1,200,000; what came in whole chunks is not asked for again."""
    site.then(QUESTIONS, Answer(cut=1_200_000), Answer(ranges=ranges))
    whole(get())
    kept = 1_200_000 // transfer.CHUNK_BYTES * transfer.CHUNK_BYTES
    assert site.ranges(QUESTIONS) == [None, f"bytes={kept}-"]
    assert no_pauses == [1.0]
    assert any(f"going on at byte {kept:,}" in line for line in get.said)


def test_a_later_run_goes_on_where_an_earlier_one_gave_up(get: Any, site: Site) -> None:
    """Two breaks with new bytes, then none: five tries without a new byte end the first run."""
    cuts = [600_000, 600_000, *[0] * transfer.ATTEMPTS]
    site.then(QUESTIONS, *(Answer(cut=cut) for cut in cuts))
    line = refused(get, site.url, "5 tries", "data=<folder>", "lamp.url=<mirror>")
    assert "RemoteProtocolError" in line
    assert len(site.asked) == 2 + 5 - 1  # the second break's failure is the first of the five
    whole(get())
    kept = 2 * (600_000 // transfer.CHUNK_BYTES) * transfer.CHUNK_BYTES
    assert site.ranges(QUESTIONS)[-1] == f"bytes={kept}-"


def test_the_file_changed_between_part_and_rest(get: Any, site: Site) -> None:
    """`If-Range` has the old ETag, so the site sends all of the new file; nothing is mixed."""
    site.then(QUESTIONS, Answer(cut=1_200_000))
    site.then(QUESTIONS, *[Answer(500, b"down")] * 4)
    refused(get, "HTTP 500")
    site.files[QUESTIONS] = OTHER
    folder = get()
    assert (folder / "dev_questions.json").read_bytes() == OTHER
    assert site.asked[-2][1]["if-range"] == f'"{hashlib.md5(BIG).hexdigest()}"'


def test_a_part_from_another_address_is_not_built_upon(get: Any, site: Site) -> None:
    site.then(QUESTIONS, Answer(cut=1_200_000), *[Answer(503, b"")] * 4)
    refused(get, "HTTP 503")
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
        {"Content-Range": f"bytes 1048576-{len(BIG)}/{len(BIG) + 1}"},
        {"Content-Range": None},
        {"ETag": '"another"'},
    ],
    ids=["start", "size", "none", "mark"],
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


def test_zeros_in_a_part_are_not_built_upon(get: Any, site: Site, tmp_path: Path) -> None:
    """A power loss may leave blocks that were never written: as zeros, within the right length."""
    site.then(QUESTIONS, Answer(cut=1_200_000), *[Answer(503, b"")] * 4)
    refused(get, "HTTP 503")
    part = tmp_path / "cache/LaMP_2/new/dev/dev_questions.json.part"
    with part.open("r+b") as file:
        file.seek(5000)
        file.write(bytes(4096))
    whole(get())
    assert any("zero bytes" in line for line in get.said)


def test_a_web_page_does_not_cost_what_has_come(get: Any, site: Site) -> None:
    """A captive portal, say: the part is still there for the next run."""
    site.then(QUESTIONS, Answer(cut=1_200_000), Answer(body=HTML))
    refused(get, "web page")
    whole(get())
    assert site.ranges(QUESTIONS)[-1] == "bytes=1048576-"


def test_no_length_at_all(get: Any, site: Site) -> None:
    """The end is where the connection closes: what breaks off there is seen by its brackets."""
    without = {"Content-Length": None, "Connection": "close"}
    site.then(QUESTIONS, Answer(headers=without, cut=1_200_000), Answer(headers=without))
    whole(get())
    assert get.shown[0] == ("dev_questions.json", transfer.CHUNK_BYTES, None)
    assert any("before the closing ]" in line for line in get.said)

"""What lies in the cache, what is known of it, and what is believed."""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import InputError
from tasks.lamp.download import MANIFEST, cache_folder, official_files
from tasks.lamp.options import LampOptions
from tests.unit.lamp.download.case import BIG, GOLDS, OTHER, refused, whole
from tests.unit.lamp.web import HTML, Site, serving


def test_files_come_whole_and_are_recorded(get: Any, site: Site, tmp_path: Path) -> None:
    folder = get()
    assert folder == tmp_path / "cache" / "LaMP_2" / "new" / "dev"
    whole(folder)
    known = json.loads((folder.parent / MANIFEST).read_text())
    assert set(known) == {"dev/dev_questions.json", "dev/dev_outputs.json"}
    entry = known["dev/dev_questions.json"]
    assert entry["sha256"] == hashlib.sha256(BIG).hexdigest()
    assert entry["url"] == site.url + "/LaMP_2/new/dev/dev_questions.json"
    # Progress grows to the whole of each file.
    for name, content in (("dev_questions.json", BIG), ("dev_outputs.json", GOLDS)):
        shown = [(done, total) for shown_name, done, total in get.shown if shown_name == name]
        assert shown == sorted(shown)
        assert shown[-1] == (len(content), len(content))
    assert len(get.shown) > 3
    # All there: the site is not asked again, not even whether it is there.
    asked = len(site.asked)
    assert get(url="http://127.0.0.1:9/LaMP") == folder
    assert len(site.asked) == asked == 2


@pytest.mark.parametrize(
    ("lamp_task", "options", "path"),
    [
        ("LaMP-1", {}, "LaMP_1/dev/dev"),
        ("LaMP-2M", {}, "LaMP_2/new/dev/dev"),
        ("LaMP-2N", {}, "LaMP_2/dev/dev"),
        ("LaMP-3", {"part": "train"}, "LaMP_3/train/train"),
        ("LaMP-4", {}, "LaMP_4/dev/dev"),
        ("LaMP-5", {"split": "time"}, "time/LaMP_5/dev/dev"),
        ("LaMP-2M", {"split": "time", "part": "train"}, "time/LaMP_2/new/train/train"),
        ("LaMP-7", {}, "LaMP_7/dev/dev"),
    ],
)
def test_addresses_are_those_of_the_site(
    site: Site, tmp_path: Path, lamp_task: str, options: dict[str, Any], path: str
) -> None:
    """As https://lamp-benchmark.github.io/download links them, below the default address."""
    assert LampOptions().url == "https://ciir.cs.umass.edu/downloads/LaMP"
    site.files = {f"/LaMP/{path}_questions.json": BIG, f"/LaMP/{path}_outputs.json": GOLDS}
    given = LampOptions(url=f"{site.url}/", cache=str(tmp_path), **options)
    folder = official_files(lamp_task, given, print, lambda *_: None)
    assert [asked for asked, _ in site.asked] == list(site.files)
    assert folder == tmp_path / Path(path).parent


def test_lamp_6_is_not_to_be_had(get: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data=lamp: .* LaMP-6 .* licensed corpus"):
        official_files("LaMP-6", LampOptions(cache=str(tmp_path)), print, lambda *_: None)
    assert not list(tmp_path.iterdir())


def test_a_file_that_changed_after_it_was_recorded(get: Any, site: Site) -> None:
    file = get() / "dev_questions.json"
    before = file.read_bytes()
    file.write_bytes(before.replace(b"film 1", b"film 9"))
    line = refused(get, str(file), "changed since", "delete it to download it again")
    assert hashlib.sha256(BIG).hexdigest()[:12] in line
    assert hashlib.sha256(file.read_bytes()).hexdigest()[:12] in line
    # Both ways that it names are open.
    file.unlink()
    whole(get())
    file.write_bytes(OTHER)
    (file.parent.parent / MANIFEST).unlink()
    assert (get() / "dev_questions.json").read_bytes() == OTHER
    get()


@pytest.mark.parametrize("text", ["", "[5]", "{", '{"dev/dev_questions.json": {}}'])
def test_a_manifest_that_makes_no_sense(get: Any, text: str) -> None:
    manifest = get().parent / MANIFEST
    manifest.write_text(text)
    refused(get, str(manifest), "delete it")


def test_a_cache_filled_by_hand(get: Any, site: Site, tmp_path: Path) -> None:
    """No network at all; recorded, so that a later change is seen."""
    folder = tmp_path / "cache" / "LaMP_2" / "new" / "dev"
    folder.mkdir(parents=True)
    (folder / "dev_questions.json").write_bytes(BIG)
    (folder / "dev_outputs.json").write_bytes(GOLDS)
    whole(get())
    assert site.asked == []
    entry = json.loads((folder.parent / MANIFEST).read_text())["dev/dev_questions.json"]
    assert (entry["url"], entry["sha256"]) == (None, hashlib.sha256(BIG).hexdigest())
    (folder / "dev_outputs.json").write_bytes(GOLDS.replace(b"comedy", b"sci-fi"))
    refused(get, "dev_outputs.json", "changed since")


def test_a_web_page_put_into_the_cache_by_hand(get: Any, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "LaMP_2" / "new" / "dev"
    folder.mkdir(parents=True)
    (folder / "dev_questions.json").write_bytes(HTML)
    refused(get, str(folder / "dev_questions.json"), "web page")


def test_a_read_only_cache(get: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An administrator's copy: taken, checked, and nothing is written beside it."""
    folder = tmp_path / "cache" / "LaMP_2" / "new" / "dev"
    folder.mkdir(parents=True)
    (folder / "dev_questions.json").write_bytes(BIG)
    (folder / "dev_outputs.json").write_bytes(GOLDS)
    for path in (folder, folder.parent):
        path.chmod(0o555)
    # Root may write all the same, so it is told that it may not.
    monkeypatch.setattr(os, "access", lambda _path, mode: mode != os.W_OK)
    whole(get())
    assert {path.name for path in folder.parent.iterdir()} == {"dev"}
    assert any("sha256" in line for line in get.said)


def test_a_cache_is_a_mirror(get: Any, tmp_path: Path) -> None:
    """One machine's cache, served by Python's own `http.server`, is another's lamp.url."""
    get()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_about: Any) -> None: ...

    handler = partial(Quiet, directory=str(tmp_path / "cache"))
    with serving(server := ThreadingHTTPServer(("127.0.0.1", 0), handler)):
        url = f"http://127.0.0.1:{server.server_address[1]}"
        folder = get(url=url, cache=str(tmp_path / "another"))
    assert folder.is_relative_to(tmp_path / "another")
    whole(folder)


def test_a_cache_that_is_no_folder(get: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    refused(get, str(tmp_path / "cache"), "lamp.cache")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG base directories: XDG_CACHE_HOME, ~/.cache without it; relative ones are ignored."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_folder(LampOptions()) == tmp_path / "caches" / "mta" / "lamp"
    for value in ("", "caches"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder(LampOptions()) == tmp_path / ".cache" / "mta" / "lamp"
    assert cache_folder(LampOptions(cache="~/lamp")) == tmp_path / "lamp"
    assert cache_folder(LampOptions(cache="lamp")) == Path.cwd() / "lamp"

"""Killed at any moment, or several at once: no file is ever half."""

from __future__ import annotations

import itertools
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from tasks.lamp import download
from tests.unit.lamp.download.case import BIG, OUTPUTS, QUESTIONS, child, eventually, whole
from tests.unit.lamp.web import Answer, Site


def test_killed_in_the_middle_the_next_goes_on(
    get: Any, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Twelve pieces of 64 KB are sent, and no more before the kill.
    held, pieces = threading.Event(), itertools.count(1)
    monkeypatch.setattr("tests.unit.lamp.web.sleep", lambda _: next(pieces) <= 12 or held.wait())
    site.then(QUESTIONS, Answer(wait=1.0))
    part = tmp_path / "cache/LaMP_2/new/dev/dev_questions.json.part"
    with child(site, tmp_path) as running:
        eventually(lambda: part.exists() and part.stat().st_size >= 2 * download.CHUNK_BYTES)
        running.send_signal(signal.SIGKILL)
    held.set()
    kept = part.stat().st_size
    assert 0 < kept < len(BIG)
    assert not (part.parent / "dev_questions.json").exists()
    whole(get())
    assert site.ranges(QUESTIONS) == [None, f"bytes={kept}-"]


def test_killed_between_whole_and_placed(
    get: Any, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part is whole: not one byte of it comes again."""

    def dies(*_about: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            get()
    whole(get())
    assert site.ranges(QUESTIONS) == [None, f"bytes={len(BIG)}-"]


def test_two_processes_at_once(site: Site, tmp_path: Path, get: Any) -> None:
    """One downloads each file once; the others wait and find what it got."""
    site.then(QUESTIONS, Answer(wait=0.001))
    running = [child(site, tmp_path) for _ in range(3)]
    folders = {process.communicate(timeout=300)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert folders == {str(tmp_path / "cache/LaMP_2/new/dev")}
    whole(get())
    assert [path for path, _ in site.asked] == [QUESTIONS, OUTPUTS]


def test_threads_at_once_say_that_they_wait(
    get: Any, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()
    monkeypatch.setattr("tests.unit.lamp.web.sleep", lambda _: held.wait())
    site.then(QUESTIONS, Answer(wait=1.0))
    threads = [threading.Thread(target=get) for _ in range(2)]
    threads[0].start()
    eventually(lambda: len(site.asked) == 1)
    threads[1].start()
    eventually(lambda: any("another process" in line for line in get.said))
    held.set()
    for thread in threads:
        thread.join()
    whole(get())
    assert [path for path, _ in site.asked] == [QUESTIONS, OUTPUTS]

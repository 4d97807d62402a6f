"""LaMP-2M of a small site: its files, and what is asked of a download of them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import InputError
from tests.unit.lamp.web import Site, official

QUESTIONS = "/LaMP/LaMP_2/new/dev/dev_questions.json"
OUTPUTS = "/LaMP/LaMP_2/new/dev/dev_outputs.json"
# About 2 MB, so several chunks; the second has other words and another length.
BIG, GOLDS = official(users=50, items=4, filler=10_000)
OTHER, _ = official(users=50, items=4, filler=9_000)


def whole(folder: Path) -> None:
    """The site's two files lie there, and nothing else does."""
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        "dev_questions.json": BIG,
        "dev_outputs.json": GOLDS,
    }


def refused(get: Callable[..., Path], *words: str, **options: Any) -> str:
    """The one line it fails with, which holds all of `words`."""
    with pytest.raises(InputError) as caught:
        get(**options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


CHILD = """
import sys
from tasks.lamp.download import official_files
from tasks.lamp.options import LampOptions
options = LampOptions(url=sys.argv[1], cache=sys.argv[2])
print(official_files("LaMP-2M", options, lambda _: None, lambda *_: None))
"""


def child(site: Site, tmp_path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, site.url, str(tmp_path / "cache")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[4],
    )


def eventually(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + 300
    wait = threading.Event()
    while not true():
        assert time.monotonic() < limit
        wait.wait(0.01)

"""A site on this machine for each test, and `data=lamp` pointed at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.lamp import download
from tasks.lamp.options import LampOptions
from tests.unit.lamp.download.case import BIG, GOLDS, OUTPUTS, QUESTIONS
from tests.unit.lamp.web import Site, serving


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between tries are noted instead of waited for; no proxy stands in the way."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    pauses: list[float] = []
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=pauses.append))
    return pauses


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    site.files |= {QUESTIONS: BIG, OUTPUTS: GOLDS}
    with serving(site):
        yield site


@pytest.fixture
def get(site: Site, tmp_path: Path) -> Callable[..., Path]:
    """`data=lamp` for LaMP-2M; `get.said` has the lines, `get.shown` the progress."""

    def get(**options: Any) -> Path:
        given = LampOptions(**({"url": site.url, "cache": str(tmp_path / "cache")} | options))
        return download.official_files(
            "LaMP-2M", given, get.said.append, lambda *now: get.shown.append(now)
        )

    get.said, get.shown = [], []
    return get

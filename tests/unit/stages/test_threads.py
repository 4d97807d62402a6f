"""How many threads torch has on a CPU."""

from __future__ import annotations

import os

import pytest
import torch

from tasks.config.options import ComputeOptions
from tasks.text.loading import use_threads


@pytest.mark.parametrize(
    ("told", "model", "compute", "threads"),
    [
        # `None`: all cores of this machine.
        (None, "some/hub-id", {}, None),
        ("", "some/hub-id", {}, None),
        ("3", "some/hub-id", {}, 3),
        ("3, 2", "some/hub-id", {}, 3),
        ("3", "tiny", {}, 1),
        ("3", "tiny", {"threads": 5}, 5),
        ("3", "some/hub-id", {"threads": 5}, 5),
        ("3", "some/hub-id", {"runner": "ray", "cpus_per_job": 4.0}, 4),
    ],
)
def test_by_the_options_else_as_the_machine_is_told(
    monkeypatch: pytest.MonkeyPatch,
    told: str | None,
    model: str,
    compute: dict[str, object],
    threads: int | None,
) -> None:
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    use_threads(model, ComputeOptions(**compute))
    assert found == [threads or os.cpu_count()]

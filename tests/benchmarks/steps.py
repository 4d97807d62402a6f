"""A training's optimiser steps, timed one by one from within it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tests.benchmarks.machine import wait

MOST_WARM = 2


class Enough(Exception):
    """Training was timed for long enough."""


@dataclass
class Steps:
    """Told of each optimiser step, it takes its seconds; after `until` it ends the training."""

    device: torch.device
    until: float
    seconds: list[float] = field(default_factory=list)
    after: Callable[[int], None] = lambda _: None
    _last: float = 0.0

    def __call__(self, done: int, _total: int) -> None:
        wait(self.device)
        now = time.monotonic()
        self.seconds.append(now - self._last)
        self.after(done)
        if now + self.seconds[-1] > self.until:
            raise Enough
        self.begin()

    def begin(self) -> None:
        wait(self.device)
        self._last = time.monotonic()

    @property
    def warm(self) -> int:
        """Steps that are warm-up: one where it was long."""
        return MOST_WARM if self.seconds[0] < 5.0 else 1

    @property
    def timed(self) -> list[float]:
        """All after the warm-up; empty where there was no time for any."""
        return self.seconds[self.warm :]

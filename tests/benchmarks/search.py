"""The search for each user's nearest anchors, a million users at once.

    python -m tests.benchmarks.many_users --search [--search-users N]

What is timed is `tasks.method.weights.search`, which the stage runs: cosines of random unit vectors
(float32) with those of 50 anchors, the 8 nearest, and their weights. The opponent is the loop over
users in Python that the stage had before, on the first 2,000 of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from tasks.config.options import FusionOptions
from tasks.method.weights import search
from tests.benchmarks.machine import CPU, peak_bytes, reset_peak, timed

ANCHORS, DIMENSIONS, TOP = 50, 384, 8
LOOPED = 2_000


def unit_vectors(count: int, dimensions: int, seed: int, block: int = 65_536) -> np.ndarray:
    """[count, dimensions] float32 of length 1; made in blocks, so nothing else is as large."""
    generator = np.random.default_rng(seed)
    vectors = np.empty((count, dimensions), np.float32)
    for start in range(0, count, block):
        part = vectors[start : start + block]
        generator.standard_normal(dtype=np.float32, out=part)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def recipe_alone(
    similarities: np.ndarray, members: Sequence[Any], options: FusionOptions
) -> dict[str, list[Any]]:
    """The opponent: one user's recipe from similarities [K], as the stage once made each."""
    similarities = np.round(similarities, 6)
    top = np.argsort(-similarities, kind="stable")[: options.top_m]
    chosen = similarities[top]
    if options.weights == "softmax":
        raw = np.exp((chosen - chosen.max()) / options.temperature)
    elif options.order == "published":
        raw = chosen
    else:
        raw = np.maximum(chosen, 0.0)
        raw = raw if raw.sum() > 0 else np.ones(len(top))
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = raw / raw.sum()
    if options.order == "published":
        weights = weights[::-1]
    return {
        "anchors": [members[index] for index in top],
        "similarities": chosen.tolist(),
        "weights": weights.tolist(),
    }


def measure_search(users: int, repetitions: int) -> dict[str, Any]:
    """Seconds for all, users per second, ratio to the loop, and the process's memory."""
    options = FusionOptions(top_m=TOP)
    points, bank = unit_vectors(users, DIMENSIONS, 0), unit_vectors(ANCHORS, DIMENSIONS, 1)
    members = [f"anchor-{number}" for number in range(ANCHORS)]

    def loop() -> None:
        for row in points[:LOOPED] @ bank.T:
            recipe_alone(row, members, options)

    reset_peak(CPU)
    before = peak_bytes(CPU)
    seconds, looped = [], []
    for _ in range(repetitions):
        seconds.append(timed(lambda: search(points, bank, options), CPU))
        looped.append(timed(loop, CPU) / min(LOOPED, users))
    median = statistics.median(seconds)
    return {
        "search_users": users,
        "search_seconds": round(median, 4),
        "search_users_per_second": round(users / median, 1),
        "search_ratio_vs_loop": round(statistics.median(looped) / (median / users), 2),
        "search_peak_bytes": peak_bytes(CPU),
        "search_peak_bytes_before": before,
    }

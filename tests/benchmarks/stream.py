"""A stream of users, in groups: what a user costs, and memory, however many came before.

    python -m tests.benchmarks.many_users --stream [N] [--group 512]

Users are made when their group's turn comes, trained, and what they trained is dropped. Timed is
their training with making the merged LoRAs, not the making of random users. 128 users are timed in
the same way, before the stream and after it, and the median taken.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

from tasks.lora.batches import Encoded
from tests.benchmarks.engine import Engine
from tests.benchmarks.machine import peak_bytes, reset_peak, timed
from tests.benchmarks.shapes import make_users

FEW = 128


def measure_stream(
    engine: Engine, shape: dict[str, Any], users: int, group: int, repetitions: int
) -> dict[str, Any]:
    """Cost per user of `users` in groups of `group`, as a ratio to that of 128, and peak memory.

    Peaks are of the phase alone: of the 128, of the stream up to its first group, of all of it.
    """
    device = engine.base.device

    def train(these: Sequence[Sequence[Encoded]], first: int) -> None:
        engine.train(these, engine.merged(len(these)), first)

    few = list(islice(make_users(shape), FEW))
    reset_peak(device)
    train(few, 0)
    of_few = peak_bytes(device)
    alone = [timed(partial(train, few, 0), device) / FEW for _ in range(repetitions)]
    source = make_users(shape, seed=4)
    groups: list[float] = []
    after_first = 0
    reset_peak(device)
    for first in range(0, users, group):
        these = list(islice(source, min(group, users - first)))
        groups.append(timed(partial(train, these, first), device))
        after_first = after_first or peak_bytes(device)
    of_stream = peak_bytes(device)
    alone += [timed(partial(train, few, 0), device) / FEW for _ in range(repetitions)]
    one, many = statistics.median(alone), sum(groups) / users
    return {
        "stream_users": users,
        "stream_group": group,
        "stream_seconds_per_user": round(many, 6),
        "stream_seconds_per_user_of_128": round(one, 6),
        "stream_vs_128": round(many / one, 3),
        "stream_peak_bytes_of_128": of_few,
        "stream_peak_bytes_first_group": after_first,
        "stream_peak_bytes": of_stream,
        "stream_times": {"groups": groups, "of_128": alone},
    }

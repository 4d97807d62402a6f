"""torch's own counters of what was multiplied, copied and allocated."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

aten = torch.ops.aten
T = TypeVar("T")


def _added(_to: Any, left: Any, right: Any, *_rest: Any, **_options: Any) -> int:
    """2 x [..., n, k] by [..., k, m]."""
    return 2 * torch.Size(left).numel() * right[-1]


# What the counter does not know: baddbmm in place, and attention as it is on a CPU. There are as
# many key-value heads as the model has; the counter's own formulas take that.
_MORE = {
    aten.baddbmm_: _added,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, k, v
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}


def _knows_grouped_queries() -> bool:
    """Whether the counter can count fewer key-value heads than heads: 2.13's does, 2.11's fails."""
    try:
        return sdpa_flop_count((1, 2, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)) > 0
    except AssertionError:
        return False


def flops(call: Callable[[], Any]) -> int:
    """FLOPs of all products in `call`; the test is skipped where torch's counter cannot say."""
    if not _knows_grouped_queries():
        pytest.skip(f"the FLOP counter of torch {torch.__version__} knows no grouped queries")
    with FlopCounterMode(display=False, custom_mapping=_MORE) as counter:
        call()
    return sum(counter.get_flop_counts()["Global"].values())


def _profiled(call: Callable[[], Any], read: Callable[[profile], T], **options: bool) -> T:
    """What `read` takes from torch's profiler on `call`.

    The profiler has noted nothing at all once, so it may try again.
    """
    for _ in range(3):
        with profile(activities=[ProfilerActivity.CPU], **options) as measured:
            call()
        if result := read(measured):
            break
    return result


def operations(call: Callable[[], Any]) -> Counter[tuple[str, int]]:
    """How often each operation ran in `call`, by its name and the size of its first input."""

    def read(measured: profile) -> Counter[tuple[str, int]]:
        return Counter(
            (event.name.removeprefix("aten::"), math.prod(event.input_shapes[0]))
            for event in measured.events() or ()
            if event.input_shapes
        )

    return _profiled(call, read, record_shapes=True)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes of tensors that were there at once in `call`, beside those before it."""

    def read(measured: profile) -> int:
        held = peak = 0
        for event in measured.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak

    return _profiled(call, read, profile_memory=True)

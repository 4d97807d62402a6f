"""The benchmark's count of FLOPs, against torch's own counter of what was really multiplied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tasks.lora.base import Base
from tasks.lora.group_train import train_group
from tasks.lora.grouped import grouped, shapes_of
from tasks.lora.merge import MergedUsers
from tests.benchmarks.machine import training_flops
from tests.unit.lora.group_case import RECIPES, bank_of
from tests.unit.lora.helpers import sample, training

aten = torch.ops.aten


def product(left: Any, right: Any, *_rest: Any, **_options: Any) -> int:
    """2 x [..., n, k] by [..., k, m]."""
    return 2 * torch.Size(left).numel() * right[-1]


def added(_to: Any, left: Any, right: Any, *rest: Any, **_options: Any) -> int:
    return product(left, right)


@pytest.mark.parametrize("under", [None, "exact"])
def test_flops_are_those_that_were_done(fresh_base: Callable[[], Base], under: str | None) -> None:
    """Samples of one length, so that nothing is padded and every position counts."""
    base = fresh_base()
    users = [[sample(10 * u + i, 9, 3) for i in range(4)] for u in range(5)]
    shapes = shapes_of(base.model, "all-linear", 4)
    merged = MergedUsers(bank_of(base.model), RECIPES, "exact", base.device) if under else None
    counter = FlopCounterMode(display=False, custom_mapping={aten.baddbmm_: added})
    with grouped(base.model, list(shapes.sizes)) as layers, counter:
        outcome = train_group(
            base,
            layers,
            shapes,
            users,
            training(epochs=2, batch_size=2),
            list(range(5)),
            scale=2.0,
            frozen=merged.parts if merged else None,
        )
    assert outcome.padding == 0.0
    counts = counter.get_flop_counts()["Global"]
    done = sum(count for kind, count in counts.items() if "attention" not in str(kind))
    rank = 0 if merged is None else merged.parts([0])["model.layers.0.mlp.up_proj"].a.shape[1]
    labels = 2 * 5 * 4 * 3
    expected = training_flops(base.model.config, shapes, rank, sum(outcome.tokens), labels)
    # Beside these there are the rotary embedding's products, of a position with a few frequencies.
    assert expected <= done <= 1.01 * expected

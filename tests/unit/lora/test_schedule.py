"""The learning rate of every step, against transformers' schedulers and the published numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from tasks.lora.train import epochs, learning_rates
from tests.unit.lora.group_case import Group, histories
from tests.unit.lora.helpers import MakeBase, training


@settings(deadline=None, max_examples=150)
@given(
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    steps=st.integers(1, 60),
    share=st.sampled_from([0.0, 0.03, 0.1, 0.25, 0.5, 1.0]) | st.floats(0.0, 1.0),
    rate=st.floats(1e-6, 1.0),
)
def test_learning_rate_is_transformers(
    schedule: str, steps: int, share: float, rate: float
) -> None:
    options = training(learning_rate=rate, schedule=schedule, warmup_share=share)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    wanted = get_scheduler(
        "constant_with_warmup" if schedule == "constant" else schedule,
        optimizer,
        num_warmup_steps=math.ceil(share * steps),
        num_training_steps=steps,
    )
    for got in learning_rates(options, steps):
        now = optimizer.param_groups[0]["lr"]
        assert got == pytest.approx(now, rel=1e-12, abs=1e-18)
        optimizer.step()
        wanted.step()


def test_published_schedule_of_ten_items_moves_once(fresh_base: MakeBase) -> None:
    """docs/method.md, stage 3: 10 items in batches of 2 x 4 are two steps, the first at rate 0."""
    options = training(learning_rate=5e-5, epochs=1, batch_size=2, accumulation=4, warmup_share=0.1)
    assert [len(step) for step in epochs(10, options, 13)] == [4, 1]
    assert learning_rates(options, 2) == [0.0, 5e-5]
    these = Group(fresh_base(), options, [histories()[2]], [13])
    got, _ = these.together()
    largest = max(float(b.abs().max()) for _, b in got[0].layers.values())
    # Adam's first real step of a clipped gradient is near the rate: it cannot be ten times it.
    assert 0.1 * 5e-5 < largest < 2 * 5e-5

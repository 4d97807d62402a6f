"""Steps that do not fit the device in one pass give the gradients of one that does."""

from __future__ import annotations

import pytest
import torch

from tasks.errors import InputError
from tasks.lora.train import Outcome
from tests.unit.lora.group_case import (
    BOUND,
    CASES,
    Group,
    close,
    group,
    narrow_device,
    small_device,
)
from tests.unit.lora.helpers import MakeBase, sample


@pytest.mark.parametrize("most", [1, 2])
def test_out_of_memory_halves(
    fresh_base: MakeBase, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Six users of one size start as one micro-batch."""
    users = [[sample(10 * u + i, 12, 3) for i in range(4)] for u in range(6)]
    these = Group(fresh_base(), CASES["constant, warm-up, bare base"][0], users, list(range(6)))
    wanted, plain = these.together(positions=10_000)
    assert plain.halved == 0
    sizes = small_device(monkeypatch, most)
    got, outcome = these.together(positions=10_000)
    assert max(sizes) == 6
    assert outcome.halved > 0
    assert outcome.failed == []
    close(got, wanted, BOUND[torch.float32])
    assert outcome.tokens == plain.tokens
    # It learns: the last step starts with batches no larger than the halved budget allows.
    assert sizes[-1] <= most


@pytest.mark.parametrize("most", [1, 2])
def test_a_lone_user_s_step_is_worked_off_in_pieces(
    fresh_base: MakeBase, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, most: int
) -> None:
    """Steps of four samples on a device that holds one or two: the same as in one pass."""
    these = group(fresh_base(), dtype)
    wanted, plain = these.together()
    sizes = narrow_device(monkeypatch, most)
    got, outcome = these.together(positions=10_000)
    assert max(sizes) > most
    assert outcome.halved > 0
    close(got, wanted, BOUND[dtype])
    assert outcome.tokens == plain.tokens
    close_losses(outcome, plain)


def test_a_step_over_the_budget_is_cut_beforehand(
    fresh_base: MakeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 positions hold one or two of these samples: nothing larger is ever tried."""
    these = group(fresh_base())
    wanted, plain = these.together()
    sizes = narrow_device(monkeypatch, 100)
    got, outcome = these.together(positions=40)
    assert max(sizes) <= 3
    assert (outcome.halved, outcome.tokens) == (0, plain.tokens)
    close(got, wanted, BOUND[torch.float32])
    close_losses(outcome, plain)


def close_losses(a: Outcome, b: Outcome) -> None:
    for one, other in zip(a.losses, b.losses, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_one_sample_that_does_not_fit_is_said(
    fresh_base: MakeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_device(monkeypatch, 0)
    with pytest.raises(InputError, match=r"one sample of \d+ tokens does not fit"):
        group(fresh_base()).together()


def test_halved_positions_stay_halved(
    fresh_base: MakeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four users of 4 rows of 15 positions, two of whom fit: only the first step is tried whole."""
    users = [[sample(10 * u + i, 12, 3) for i in range(4)] for u in range(4)]
    options = CASES["constant, warm-up, bare base"][0]
    sizes = small_device(monkeypatch, 2)
    _, outcome = Group(fresh_base(), options, users, [0, 1, 2, 3]).together(positions=240)
    assert outcome.halved == 1
    assert sizes == [4, *[2] * 4]

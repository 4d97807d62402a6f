"""Users trained together of whom one, or all, cannot be: who is named, and what the others keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tasks.lora import group_train
from tasks.lora.adapters import LoraBatch
from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.group_train import train_group
from tasks.lora.grouped import grouped, shapes_of
from tasks.lora.packing import Packed
from tasks.lora.train import epochs
from tests.unit.lora.group_case import (
    BOUND,
    HISTORIES,
    RANK,
    SCALE,
    SEEDS,
    group,
    histories,
)
from tests.unit.lora.helpers import MakeBase, equal_tensors, training
from tests.unit.lora.peft_reference import largest_difference


def test_a_user_without_samples_is_named(fresh_base: MakeBase) -> None:
    these = group(fresh_base())
    these.samples[3] = []
    with pytest.raises(ValueError, match="user 3: no samples"):
        these.together()


def test_nan_of_a_frozen_part_is_one_users(fresh_base: MakeBase) -> None:
    """User 1's merged LoRA holds NaN: the user stays as it began, all others as without the NaN."""
    these = group(fresh_base())
    wanted, clean = these.together()
    healthy = these.parts(range(len(HISTORIES)))

    def parts(users: Any) -> LoraBatch:
        made = healthy(users)
        for _, b in made.layers.values():
            for row, user in enumerate(users):
                if user == 1:
                    b[row] = float("nan")
        return made

    got, outcome = these.together(frozen=parts)
    assert outcome.failed == [1]
    assert equal_tensors(got[1], these.start(1))
    assert len(outcome.losses[1]) == 1
    assert math.isnan(outcome.losses[1][0])
    for user in (0, 2, 3, 4):
        assert largest_difference(got[user], wanted[user]) <= BOUND[torch.float32]
        assert outcome.losses[user] == pytest.approx(clean.losses[user], rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_stops_being_finite(
    fresh_base: MakeBase, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In user 2's third step of six: the weights are those of stock PEFT after two steps."""
    these = group(fresh_base())
    steps = list(epochs(HISTORIES[2], these.options, SEEDS[2]))
    marked = steps[2][0][0]
    assert sum(marked in batch for step in steps[:2] for batch in step) == 0
    own = these.samples[2][marked]
    these.samples[2][marked] = Encoded(own.prompt, [299, 2])
    others = [item for u, items in enumerate(these.samples) for item in items
              if (u, item) != (2, these.samples[2][marked])]  # fmt: skip
    assert not any(299 in item.answer for item in others)
    wanted, _ = these.together()
    real = group_train.label_losses

    def poisoned(base: Base, packed: Packed) -> torch.Tensor:
        losses = real(base, packed)
        return losses * torch.where(packed.label == 299, value, 1.0)

    monkeypatch.setattr(group_train, "label_losses", poisoned)
    got, outcome = these.together()
    assert outcome.failed == [2]
    assert len(outcome.losses[2]) == 3
    assert not math.isfinite(outcome.losses[2][2])
    assert largest_difference(got[2], these.alone(2, stop=2)[0]) <= BOUND[torch.float32]
    # Those who had done their steps by then have the same bits; user 1 goes on in other company.
    for user in (0, 3, 4):
        assert equal_tensors(got[user], wanted[user])
    assert largest_difference(got[1], wanted[1]) <= BOUND[torch.float32]


def test_a_gradient_that_is_not_finite(
    fresh_base: MakeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss whose gradient is not, as of a root at 0: user 4 stays as it began."""
    these = group(fresh_base())
    own = these.samples[4]
    these.samples[4] = [Encoded(item.prompt, [*item.answer[:-1], 299, 2]) for item in own]
    wanted, clean = these.together()
    real = group_train.label_losses

    def steep(base: Base, packed: Packed) -> torch.Tensor:
        losses = real(base, packed)
        bad = losses[packed.label == 299]
        root = torch.zeros_like(losses)
        root[packed.label == 299] = (bad - bad.detach()).sqrt()
        return losses + root

    monkeypatch.setattr(group_train, "label_losses", steep)
    got, outcome = these.together()
    assert outcome.failed == [4]
    assert outcome.losses[4] == pytest.approx(clean.losses[4][:1])
    assert equal_tensors(got[4], these.start(4))
    for user in range(4):
        assert largest_difference(got[user], wanted[user]) <= BOUND[torch.float32]


def test_everyone_fails(fresh_base: MakeBase) -> None:
    base = fresh_base()
    with torch.no_grad():
        base.model.lm_head.weight.fill_(float("nan"))
    these = group(base)
    got, outcome = these.together()
    assert sorted(outcome.failed) == [0, 1, 2, 3, 4]
    assert all(equal_tensors(got[user], these.start(user)) for user in got)


def test_a_failed_job_leaves_the_model_as_it_was(
    fresh_base: MakeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loaded model serves the next job: it must answer in evaluation mode, without LoRAs."""
    base = fresh_base()
    base.model.gradient_checkpointing_enable({"use_reentrant": False})

    def broken(*_args: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr("tasks.lora.group_train.label_losses", broken)
    shapes = shapes_of(base.model, "all-linear", RANK)
    with grouped(base.model, list(shapes.sizes)) as layers:
        with pytest.raises(RuntimeError, match="no luck"):
            train_group(base, layers, shapes, histories(), training(), SEEDS, scale=SCALE)
        assert all(layer.joined is None for layer in layers.values())
    assert not base.model.training

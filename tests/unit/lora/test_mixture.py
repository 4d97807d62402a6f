"""Trained weights of merged LoRAs against autograd on a model with dense merged weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.group_train import Gradients
from tasks.lora.grouped import grouped
from tasks.lora.merge import MergedUsers
from tasks.lora.mixture import train_weights
from tasks.lora.train import Outcome
from tests.unit.lora.group_case import RECIPES, bank_of, histories
from tests.unit.lora.helpers import MakeBase

BOUND = {torch.float32: 2e-4, torch.float64: 1e-10}


def dense_loss(
    base: Base, user: int, weights: Tensor, samples: Sequence[Encoded], how: str
) -> Tensor:
    """-log p, summed over answer tokens: W + s sum_i w_i B_i A_i (or of the sums), one by one."""
    members = [bank_of(base.model).lora(name) for name in RECIPES[user][0]]
    changed = {}
    for name in members[0].layers:
        pairs = [lora.layers[name] for lora in members]
        if how == "exact":
            update = sum(w * b @ a for w, (a, b) in zip(weights, pairs, strict=True))
        else:
            both = [
                sum(w * p[side] for w, p in zip(weights, pairs, strict=True)) for side in (0, 1)
            ]
            update = both[1] @ both[0]
        weight = base.model.get_submodule(name).weight
        changed[f"{name}.weight"] = weight + members[0].scale * update
    total = torch.zeros((), dtype=weights.dtype)
    for sample in samples:
        ids = torch.tensor([sample.prompt + sample.answer])
        logits = functional_call(base.model, changed, kwargs={"input_ids": ids}).logits[0]
        answers = torch.tensor(sample.answer)
        total = total + cross_entropy(logits[len(sample.prompt) - 1 : -1], answers, reduction="sum")
    return total


def merged_of(base: Base, users: Sequence[int], how: str) -> MergedUsers:
    return MergedUsers(bank_of(base.model), [RECIPES[u] for u in users], how, base.device)


def start_of(user: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor(RECIPES[user][1], dtype=dtype)


@pytest.mark.parametrize("how", ["exact", "factors"])
def test_the_gradient_is_that_of_the_dense_model(
    fresh_base: MakeBase, dtype: torch.dtype, how: str
) -> None:
    """Of all users at once, in small batches, over an unequal number of items."""
    base = fresh_base()
    base.model.to(dtype)
    merged = merged_of(base, range(5), how)
    samples, outcome = histories(), Outcome(torch.zeros(0), [], [0] * 5)
    flat, grad = merged.weights.clone(), torch.zeros(5, 2, dtype=torch.float64)
    with grouped(base.model, list(merged.layers)) as layers:
        gradients = Gradients(base, layers, merged.weighed, None, 60, outcome)
        losses = gradients.fill(grad, flat, dict(enumerate(samples)))
    for user, own in enumerate(samples):
        weights = start_of(user, dtype).requires_grad_()
        loss = dense_loss(base, user, weights, own, how)
        (wanted,) = torch.autograd.grad(loss, weights)
        count = sum(len(one.answer) for one in own)
        assert losses[user] == pytest.approx(loss.item() / count, rel=1e-4)
        largest = float(wanted.abs().max())
        assert (count * grad[user] - wanted).abs().max() < BOUND[dtype] * max(largest, 1.0)
        assert largest > 0.1


def trained(base: Base, users: Sequence[int], **changes: Any) -> Outcome:
    options = {"steps": 4, "learning_rate": 0.05, "penalty": 3.0} | changes
    merged = merged_of(base, users, "exact")
    with grouped(base.model, list(merged.layers)) as layers:
        return train_weights(base, layers, merged, [histories()[u] for u in users], **options)


def test_it_is_adam_on_the_penalised_loss(fresh_base: MakeBase) -> None:
    """Users together as torch's Adam trains each alone, on dense weights, with the penalty."""
    base = fresh_base()
    got = trained(base, range(3))
    for user in range(3):
        start = start_of(user, torch.float64)
        weights = start.clone().requires_grad_()
        adam = torch.optim.Adam([weights], lr=0.05)
        for _ in range(4):
            adam.zero_grad()
            loss = dense_loss(base, user, weights.float(), histories()[user], "exact").double()
            (loss + 1.5 * ((weights - start) ** 2).sum()).backward()
            adam.step()
        assert (got.flat[user] - weights.detach()).abs().max() < 1e-4
        assert (weights.detach() - start).abs().max() > 0.05
        assert len(got.losses[user]) == 4
        # Alone it is the same user.
        alone = trained(base, [user])
        assert (alone.flat[0] - got.flat[user]).abs().max() < 1e-5
        assert alone.tokens[0] == got.tokens[user]


def test_without_steps_it_is_where_it_began(fresh_base: MakeBase) -> None:
    got = trained(fresh_base(), range(5), steps=0)
    assert got.flat.tolist() == [list(weights) for _, weights in RECIPES]
    assert got.tokens == [0] * 5


def test_the_penalty_holds_weights_back(fresh_base: MakeBase) -> None:
    """By steps of Adam, which does not see its scale, a strong one cannot move far; none can."""
    base, moved = fresh_base(), []
    for penalty in (0.0, 30.0, 3000.0):
        got = trained(base, range(2), steps=30, penalty=penalty)
        start = torch.tensor([weights for _, weights in RECIPES[:2]], dtype=torch.float64)
        moved.append(float((got.flat - start).norm()))
    assert moved[0] > 2 * moved[1] > 4 * moved[2]


def test_who_has_no_items_keeps_the_prior(fresh_base: MakeBase) -> None:
    base = fresh_base()
    merged = merged_of(base, [0, 1], "exact")
    with grouped(base.model, list(merged.layers)) as layers:
        got = train_weights(
            base, layers, merged, [[], histories()[1]], steps=3, learning_rate=0.1, penalty=0.0
        )
    assert got.flat[0].tolist() == [0.75, 0.25]
    assert got.flat[1].tolist() != [0.5, 0.5]
    assert (got.losses[0], got.tokens[0], got.failed) == ([], 0, [])


def test_weights_that_are_not_finite_are_given_up(fresh_base: MakeBase) -> None:
    """At a rate beyond float32 the second step's loss is no number."""
    got = trained(fresh_base(), [0, 1], learning_rate=1e30)
    assert got.failed == [0, 1]
    assert got.flat.tolist() == [list(RECIPES[u][1]) for u in (0, 1)]

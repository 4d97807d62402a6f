"""The benchmark's plain engine, an implementation of its own, against the grouped one."""

from __future__ import annotations

import pytest
import torch

from tasks.lora.grouped import fresh, shapes_of
from tasks.lora.merge import MergedUsers
from tests.benchmarks.plain_bmm import train_plain
from tests.unit.lora.group_case import BOUND, CASES, LR, RANK, RECIPES, SCALE, Group, bank_of
from tests.unit.lora.helpers import MakeBase, sample

SEEDS = [21, 22, 23, 24, 25]


def plain(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [U, P] before and after."""
    base, model = group.base, group.base.model
    shapes = shapes_of(model, "all-linear", RANK)
    start = fresh(shapes, group.seeds, model.dtype)
    under = None
    if group.how is not None:
        merged = MergedUsers(bank_of(model), RECIPES, group.how, base.device)
        under = merged.parts(range(len(RECIPES)))
    pad = base.tokenizer.pad_token_id
    end = train_plain(
        model, group.samples, group.options, group.seeds, shapes, start, SCALE, under, pad
    )
    return start, end


@pytest.mark.parametrize(
    "case", ["cosine, clipped, exact", "linear, clipped, factors", "one by one, no clip, no decay"]
)
def test_the_plain_engine_trains_the_same_loras(
    fresh_base: MakeBase, dtype: torch.dtype, case: str
) -> None:
    """Five users of five samples of unlike lengths: the last step of an epoch is a smaller one."""
    options, how = CASES[case]
    base = fresh_base()
    base.model.to(dtype)
    users = [
        [sample(60 * u + i, 4 + (5 * i + 3 * u) % 19, 1 + (i + u) % 4) for i in range(5)]
        for u in range(len(SEEDS))
    ]
    group = Group(base, options, users, SEEDS, how)
    loras, outcome = group.together()
    start, end = plain(group)
    assert float((end - outcome.flat).abs().max()) <= BOUND[dtype]
    # All of them moved, by far more than the bound.
    assert float((end - start).abs().max(1).values.min()) > LR
    assert len(loras) == len(SEEDS)
    assert type(base.model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_unequal_users_are_refused(fresh_base: MakeBase) -> None:
    users = [[sample(u, 5, 2)] * (u + 1) for u in range(2)]
    group = Group(fresh_base(), CASES["cosine, clipped, exact"][0], users, SEEDS[:2])
    with pytest.raises(ValueError, match="equally many samples"):
        plain(group)

"""A group of users to train: unequal histories, merged parts underneath, engine and reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tasks.lora import group_train
from tasks.lora.adapters import Lora
from tasks.lora.bank import Bank, stack
from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.checkpoint import Checkpoint
from tasks.lora.group_train import train_group
from tasks.lora.grouped import fresh, grouped, shapes_of
from tasks.lora.merge import MergedUsers
from tasks.lora.packing import Packed
from tasks.lora.train import Outcome, Training, epochs
from tests.unit.lora import peft_reference
from tests.unit.lora.helpers import linear_shapes, random_lora, sample, training
from tests.unit.lora.peft_reference import largest_difference

RANK, SCALE = 4, 2.0
GROUPED = SimpleNamespace(grouped=grouped, train_group=train_group)
BOUND = {torch.float32: 1e-5, torch.float64: 1e-12}
# Samples per user; in batches of 2 x 2 and two epochs that is 2, 4, 6, 2 and 2 optimiser steps.
HISTORIES = (3, 5, 10, 1, 4)
SEEDS = (11, 12, 13, 14, 15)
# Exact in any dtype, so that float64 is not spoiled by the weights' float32.
RECIPES = [
    (("a", "b"), (0.75, 0.25)),
    (("c", "a"), (0.5, 0.5)),
    (("b", "c"), (1.25, -0.25)),
    (("a", "c"), (0.25, 0.75)),
    (("c", "b"), (0.625, 0.375)),
]


def histories() -> list[list[Encoded]]:
    """Prompts of 3 to 27 tokens, answers of 1 to 6."""
    return [
        [sample(100 * u + i, 3 + (7 * i + 5 * u) % 25, 1 + (i + u) % 6) for i in range(count)]
        for u, count in enumerate(HISTORIES)
    ]


def doubled(lora: Lora, dtype: torch.dtype) -> Lora:
    return Lora({n: (a.to(dtype), b.to(dtype)) for n, (a, b) in lora.layers.items()}, lora.scale)


def bank_of(model: Any) -> Bank:
    loras = [random_lora(linear_shapes(model), 3, 0.75, seed, 0.15) for seed in (1, 2, 3)]
    return stack("abc", [doubled(lora, model.dtype) for lora in loras])


@contextmanager
def precise_norms() -> Iterator[None]:
    """Llama's norms compute in float32 whatever comes in; here in the dtype of what comes in."""

    def forward(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", forward)
        yield


@dataclass
class Group:
    """Users, by number, with what they train on and what lies under their LoRAs."""

    base: Base
    options: Training
    samples: list[list[Encoded]]
    seeds: list[int]
    how: str | None = None

    def alone(self, user: int, stop: int | None = None) -> tuple[Lora, list[float]]:
        """The reference: stock PEFT trains this user and nobody else."""
        steps = list(epochs(len(self.samples[user]), self.options, self.seeds[user]))
        return peft_reference.train(
            self.base.model,
            self.under(user),
            self.start(user),
            self.samples[user],
            steps,
            self.options,
            stop,
        )

    def under(self, user: int) -> Lora | None:
        if self.how is None:
            return None
        members, weights = RECIPES[user]
        bank = bank_of(self.base.model)
        return peft_reference.merged_by_hand([bank.lora(m) for m in members], weights, self.how)

    def parts(self, users: Sequence[int]) -> Any:
        """What lies under each of `users`, merged as the group says."""
        assert self.how is not None
        recipes = [RECIPES[user] for user in users]
        return MergedUsers(bank_of(self.base.model), recipes, self.how, self.base.device).parts

    def start(self, user: int) -> Lora:
        shapes = shapes_of(self.base.model, "all-linear", RANK)
        return shapes.loras(fresh(shapes, [self.seeds[user]], self.base.model.dtype), SCALE)[0]

    def together(
        self,
        users: Sequence[int] | None = None,
        positions: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        frozen: Callable[[Sequence[int]], Any] | None = None,
        checkpoint: Checkpoint | None = None,
        engine: Any = GROUPED,
    ) -> tuple[dict[int, Lora], Outcome]:
        """The engine: the named users (all, in order), in one call; LoRAs by user."""
        chosen = list(range(len(self.samples))) if users is None else list(users)
        model = self.base.model
        shapes = shapes_of(model, "all-linear", RANK)
        if self.how is not None and frozen is None:
            frozen = self.parts(chosen)
        more = {} if positions is None else {"positions": positions}
        with engine.grouped(model, list(shapes.sizes)) as layers:
            outcome = engine.train_group(
                self.base,
                layers,
                shapes,
                [self.samples[u] for u in chosen],
                self.options,
                [self.seeds[u] for u in chosen],
                scale=SCALE,
                frozen=frozen,
                **more,
                progress=progress,
                checkpoint=checkpoint,
            )
        return dict(zip(chosen, shapes.loras(outcome.flat, SCALE), strict=True)), outcome


# Small: Adam turns rounding errors of tiny gradients into steps of up to the rate. In float32 the
# reference itself is off by 0.03 of the rate; float64 says that nothing else is behind it.
LR = 1e-4
PUBLISHED = {"learning_rate": LR, "batch_size": 2, "accumulation": 2, "weight_decay": 0.1}
# Norms are about 1 to 10 here: 0.05 clips every step of every user, 1e9 none.
CASES = {
    "cosine, clipped, exact": (
        training(**PUBLISHED, schedule="cosine", warmup_share=0.3, max_grad_norm=0.05),
        "exact",
    ),
    "linear, clipped, factors": (
        training(**PUBLISHED, schedule="linear", warmup_share=0.2, max_grad_norm=0.05),
        "factors",
    ),
    "constant, warm-up, bare base": (
        training(**PUBLISHED, schedule="constant", warmup_share=0.5, max_grad_norm=2.0),
        None,
    ),
    "one by one, no clip, no decay": (
        training(learning_rate=LR, epochs=1, batch_size=1, warmup_share=0.0, max_grad_norm=1e9),
        "exact",
    ),
}


def group(
    base: Base, dtype: torch.dtype = torch.float32, case: str = "cosine, clipped, exact"
) -> Group:
    options, how = CASES[case]
    base.model.to(dtype)
    return Group(base, options, histories(), list(SEEDS), how)


def small_device(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """A device that has room for `most` users at once; the numbers of users that came."""
    real = group_train.label_losses
    sizes: list[int] = []

    def losses(base: Base, packed: Packed) -> torch.Tensor:
        sizes.append(packed.users)
        if packed.users > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(base, packed)

    monkeypatch.setattr(group_train, "label_losses", losses)
    return sizes


def narrow_device(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """A device that has room for `most` samples at once; the numbers of samples that came."""
    real = group_train.label_losses
    sizes: list[int] = []

    def losses(base: Base, packed: Packed) -> torch.Tensor:
        sizes.append(len(packed.sample.unique()))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(base, packed)

    monkeypatch.setattr(group_train, "label_losses", losses)
    return sizes


def close(got: dict[int, Lora], wanted: dict[int, Lora], bound: float) -> None:
    for user, lora in got.items():
        assert largest_difference(lora, wanted[user]) <= bound

"""The engine as it is measured: one loaded base, a bank of two anchors, any number of users."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tasks.lora.adapters import LoraBatch, write_peft
from tasks.lora.answer import answer_users
from tasks.lora.bank import Bank
from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.group_train import train_group
from tasks.lora.grouped import Shapes, grouped, shapes_of
from tasks.lora.merge import MergedUsers, merge
from tasks.lora.train import Outcome
from tests.benchmarks.shapes import training_of

STACKED_RANK, SCALE = 4, 2.0
WEIGHTS = (0.6, 0.4)


class Engine:
    """`train` and `answer` many users; every user's merged LoRA is of both anchors, exactly."""

    def __init__(self, shape: dict[str, Any], base: Base) -> None:
        self.base = base
        self.options = training_of(shape)
        self.new_tokens = shape["new"]
        self.shapes = shapes_of(self.base.model, "all-linear", STACKED_RANK)
        generator = torch.Generator().manual_seed(2)
        rank, members = shape["rank"], len(WEIGHTS)
        layers = {
            name: (
                torch.randn(members, rank, fan_in, generator=generator) / fan_in**0.5,
                torch.randn(members, fan_out, rank, generator=generator) * 0.01,
            )
            for name, (fan_in, fan_out) in self.shapes.sizes.items()
        }
        self.bank = Bank(layers, SCALE, ("0", "1"))

    @property
    def merged_width(self) -> int:
        """Numbers of one user's merged LoRA."""
        return Shapes(self.shapes.sizes, self.bank.rank * len(WEIGHTS)).width

    def write_merged(self, folder: Path) -> None:
        """The merged LoRA as an adapter for the opponents."""
        loras = [self.bank.lora(member) for member in self.bank.ids]
        write_peft(folder, merge(loras, WEIGHTS, "exact"), "base")

    def merged(self, users: int) -> MergedUsers:
        return MergedUsers(self.bank, [(self.bank.ids, WEIGHTS)] * users, "exact", self.base.device)

    def train(
        self, users: Sequence[Sequence[Encoded]], merged: MergedUsers | None, first_seed: int = 0
    ) -> Outcome:
        """One stacked LoRA per user, over the merged ones or over the bare base."""
        with grouped(self.base.model, list(self.shapes.sizes)) as layers:
            return train_group(
                self.base,
                layers,
                self.shapes,
                users,
                self.options,
                list(range(first_seed, first_seed + len(users))),
                scale=SCALE,
                frozen=merged.parts if merged else None,
            )

    def answer(
        self, questions: Sequence[Sequence[Encoded]], merged: MergedUsers, outcome: Outcome
    ) -> list[list[str]]:
        """Each user's answers with the merged and the trained LoRA of `outcome`."""

        def parts(users: Sequence[int]) -> tuple[LoraBatch, LoraBatch]:
            return merged.parts(users), LoraBatch(
                self.shapes.split(outcome.flat[list(users)]), SCALE
            )

        with grouped(self.base.model, list(self.shapes.sizes)) as layers:
            return answer_users(self.base, layers, questions, parts, self.new_tokens)

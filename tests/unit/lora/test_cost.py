"""What work is said to cost, against torch's own counters of what was multiplied and allocated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from tasks.lora.adapters import LoraBatch
from tasks.lora.answer import answer_users, forward_positions, log_likelihoods
from tasks.lora.bank import Bank
from tasks.lora.batches import Encoded
from tasks.lora.cost import (
    NOTHING,
    Flops,
    Pass,
    gpu_positions,
    position_bytes,
    shape_of,
    widths_of,
)
from tasks.lora.group_train import default_positions, train_group
from tasks.lora.grouped import Shapes, grouped, shapes_of
from tasks.lora.merge import MergedUsers
from tasks.lora.passes import (
    answer_passes,
    blank,
    likelihood_passes,
    signature_passes,
    training_passes,
)
from tasks.lora.signature import input_signatures, item_signatures
from tasks.lora.train import Outcome, Training
from tests.unit.lora.counters import flops, peak_bytes
from tests.unit.lora.group_case import bank_of
from tests.unit.lora.helpers import linear_shapes, random_lora, sample, stacked, tiny_base, training

USERS = 8
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


class Work:
    """Eight users' training on a Llama of four layers, to be done and to be counted."""

    def __init__(
        self,
        spread: int,
        targets: list[str] | str = "all-linear",
        under: str | None = None,
        checkpointing: bool = False,
        dtype: torch.dtype = torch.float32,
        hidden: int = 128,
    ) -> None:
        self.base = tiny_base(
            256,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=4,
            max_position_embeddings=512,
        )
        self.base.model.to(dtype)
        if checkpointing:
            self.base.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.samples = [
            [sample(10 * u + i, 30 + spread * ((7 * u + i) % 9), 3 + i % 3) for i in range(5)]
            for u in range(USERS)
        ]
        self.options: Training = training(epochs=2, batch_size=3)
        self.shapes = shapes_of(self.base.model, targets, 4)
        self.merged = self._merged(under) if under else None
        below = NOTHING
        if self.merged:
            below = below_of(self.merged.parts([0]))
        self.below, self.checkpointing = below, checkpointing
        self.shape = shape_of(self.base.model)
        self.flops = Flops(self.shape, self.shapes, below, checkpointing)

    def _merged(self, how: str) -> MergedUsers:
        bank = bank_of(self.base.model)
        layers = {name: (a.float(), b.float()) for name, (a, b) in bank.layers.items()}
        recipes = [(("a", "b"), (0.75, 0.25))] * USERS
        return MergedUsers(Bank(layers, bank.scale, bank.ids), recipes, how, self.base.device)

    def train(self) -> Outcome:
        names = {*self.shapes.sizes, *(self.merged.layers if self.merged else ())}
        with grouped(self.base.model, sorted(names)) as layers:
            return train_group(
                self.base,
                layers,
                self.shapes,
                self.samples,
                self.options,
                list(range(USERS)),
                scale=2.0,
                frozen=self.merged.parts if self.merged else None,
            )

    def passes(self) -> list[list[Any]]:
        blanks = [[blank(len(one.prompt), len(one.answer)) for one in own] for own in self.samples]
        positions = default_positions(self.base)
        seeds = list(range(USERS))
        return list(training_passes(blanks, self.options, seeds, positions, self.shape.packs))


def below_of(loras: LoraBatch) -> Shapes:
    """The shapes of one user's frozen LoRA."""
    sizes = {name: (a.shape[2], b.shape[1]) for name, (a, b) in loras.layers.items()}
    return Shapes(sizes, loras.rank)


def training_bytes(work: Work, done: Pass) -> int:
    """What `position_bytes` comes to in one forward and backward pass, with all that is beside it:
    the LoRAs, and what the layers without one and the last block do not keep."""
    shape, trained, each = work.shape, work.shapes, work.base.model.dtype.itemsize
    kept = done.positions * position_bytes(shape, each, work.checkpointing)
    if shape.known and not work.checkpointing:
        # After its attention the last block goes on with the labels' positions only.
        after = 4 * shape.hidden + each * (shape.hidden + 4 * shape.wide)
        kept -= (done.positions - done.picked) * after
        # Layers without a LoRA do not keep what goes in.
        ends = {layer.rpartition(".")[2] for layer in (*trained.sizes, *work.below.sizes)}
        unseen = shape.hidden * ends.isdisjoint({"q_proj", "k_proj", "v_proj"})
        unseen += shape.hidden * ends.isdisjoint({"gate_proj", "up_proj"})
        unseen += shape.wide * ("down_proj" not in ends)
        kept -= done.positions * (shape.blocks - 1) * each * unseen
    kept += 4 * done.positions * trained.rank * len(trained.sizes)
    # Logits, in the model's dtype and in float32; their log-softmax and its gradient.
    kept += done.labels * shape.head[1] * (each + (12 if each < 4 else 8))
    # The users' LoRAs by layer and beside the frozen ones, which are copies, too; at the end, when
    # nothing else is left, their gradients by layer and in one row.
    factors = 4 * done.users * 2 * (trained.width + work.below.width)
    return factors + max(kept, 4 * done.users * 2 * trained.width)


CASES: list[dict[str, Any]] = [
    {"spread": 0},
    {"spread": 9},
    {"spread": 2, "under": "exact"},
    {"spread": 2, "under": "factors", "targets": ["up_proj"]},
    {"spread": 2, "targets": ["q_proj", "v_proj"]},
    {"spread": 2, "checkpointing": True},
    {"spread": 2, "dtype": torch.bfloat16, "under": "exact"},
    {"spread": 2, "dtype": torch.bfloat16, "checkpointing": True, "hidden": 256},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training(case: dict[str, Any]) -> None:
    """FLOPs to the last one; positions; memory within a sixth."""
    work = Work(**case)
    outcome = work.train()
    steps = work.passes()
    # Five samples in batches of three, twice.
    assert [len(losses) for losses in outcome.losses] == [len(steps)] * USERS == [4] * USERS
    passes = [one for step in steps for one in step]
    assert sum(one.positions for one in passes) == outcome.computed
    counted = sum(map(work.flops.training, passes))
    assert counted == flops(work.train)
    needed = max(training_bytes(work, one) for one in passes)
    total = needed + 4 * 4 * work.shapes.width * USERS
    assert total == pytest.approx(peak_bytes(work.train), rel=1 / 6)


def test_of_one_length_only_attention_is_more() -> None:
    """What the benchmarks' MFU is of: nothing is padded, and attention is left out."""
    work = Work(spread=0)
    work.samples = [[sample(i, 30, 4) for i in range(3)]] * USERS
    outcome = work.train()
    assert outcome.padding == 0.0
    tokens = sum(outcome.tokens)
    labels = 2 * USERS * 3 * 4
    alone = work.flops.training(Pass(1, tokens, 1, labels, labels))
    # Four blocks of attention 128 wide, seven products in all: of 48 rows of 34 by 34, less what
    # each token has to do with itself.
    attention = 4 * 128 * 7 * 2 * (48 * 34 * 34 - tokens)
    assert alone + attention == flops(work.train)


@pytest.mark.parametrize("spread", [0, 5])
def test_likelihoods(spread: int) -> None:
    work = Work(spread)
    below = stacked([random_lora(linear_shapes(work.base.model), 3, 0.5, u) for u in range(USERS)])

    def parts(users: Sequence[int]) -> tuple[LoraBatch, None]:
        return below.of(users), None

    def measure() -> None:
        with grouped(work.base.model, list(below.layers)) as layers:
            log_likelihoods(work.base, layers, work.samples, parts)

    passes = likelihood_passes(work.samples, forward_positions(work.base), work.shape.packs)
    counted = sum(map(Flops(work.shape, below=below_of(below)).forward, passes))
    assert counted == flops(measure)


def test_signatures() -> None:
    """With all of V = 300 and d = 128, and projected."""
    work = Work(spread=5)
    flat = [one for own in work.samples for one in own]
    passes = signature_passes(flat, 600)
    assert len(passes) > 1
    costs = Flops(work.shape)
    for size, width in ((300, 128), (64, 32), (1000, 32)):
        counted = sum(costs.signature(one, (size, width), at_input=False) for one in passes)
        sign = partial(item_signatures, work.base, flat, size, width, 0, positions=600)
        assert counted == flops(sign)
        counted = sum(costs.signature(one, (size, width), at_input=True) for one in passes)
        sign = partial(input_signatures, work.base, flat, size, width, 0, positions=600)
        assert counted == flops(sign)


@pytest.mark.parametrize("questions", [1, 3])
def test_answers(questions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of full length: no token ends them."""
    work = Work(spread=5)
    base = work.base
    monkeypatch.setattr(base.model.generation_config, "eos_token_id", None)
    asked = [[Encoded(one.prompt, []) for one in own[:questions]] for own in work.samples]
    new = 6

    def answer() -> None:
        with grouped(base.model, []) as layers:
            answer_users(base, layers, asked, lambda _users: (None, None), new, positions=400)

    passes = answer_passes(asked, new, 400)
    assert len(passes) > 1
    costs = Flops(work.shape)
    counted = sum(costs.decode(one, new) for one in passes)
    assert counted == pytest.approx(flops(answer), rel=0.02)


def test_a_gpus_positions_fill_half_of_what_is_free() -> None:
    """Llama-3-8B in bfloat16: 8 x 4096 + 2 (2 x 4096 + 2 x 4096 + 2 x 1024 + 4 x 14336) bytes per
    position and block, and 8 x 14336 beside; and never under 512."""
    model = type("Model", (), {})()
    model.config = LlamaConfig(**LLAMA)
    widths = widths_of(model)
    block = 32_768 + 2 * (8192 + 8192 + 2048 + 57_344)
    assert position_bytes(widths, 2, False) == 32 * block + 114_688
    assert position_bytes(widths, 2, True) == block + 32 * 2 * 4096 + 114_688
    assert gpu_positions(widths, 2, False, 2 * 1000 * (32 * block + 114_688)) == 1000
    assert gpu_positions(widths, 2, False, 1) == 512

"""What samples are said to cost, against hand-worked sums and torch's own counters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from transformers import LlamaConfig

from tasks.lora.adapters import LoraBatch
from tasks.lora.answer import log_likelihoods
from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.cost import flops, gpu_positions, position_bytes, widths_of
from tasks.lora.group_train import train_group
from tasks.lora.grouped import Shapes, grouped, shapes_of
from tasks.lora.train import Outcome
from tests.unit.lora import counters
from tests.unit.lora.helpers import (
    linear_shapes,
    random_lora,
    sample,
    stacked,
    tiny_base,
    tiny_model,
    training,
)

LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
# Alike in length, so that nothing is padded.
SAMPLES = [[sample(10 * u + i, 56, 4) for i in range(4)] for u in range(2)]
FLAT = [one for own in SAMPLES for one in own]


def deep_base(hidden: int = 64, checkpointing: bool = False) -> Base:
    """Twelve blocks: what the engine leaves out of the first and the last is then little."""
    base = tiny_base(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=12)
    if checkpointing:
        base.model.gradient_checkpointing_enable({"use_reentrant": False})
    return base


def train(base: Base, shapes: Shapes) -> Outcome:
    """One step of each user, on all of its samples."""
    options, seeds = training(epochs=1, batch_size=len(SAMPLES[0])), range(len(SAMPLES))
    with grouped(base.model, [*shapes.sizes]) as layers:
        return train_group(base, layers, shapes, SAMPLES, options, seeds, scale=2.0)


@pytest.mark.parametrize("tied", [False, True])
def test_two_flops_per_parameter_and_token(tied: bool) -> None:
    """Two samples of 10 and 20 tokens, 3 and 4 of them labels, in a Llama of two blocks.

    Each block has 32 x 32 numbers for queries, 32 x 16 for keys and for values, 32 x 32 for the
    output of attention, three times 32 x 48, and two norms; and there is a last norm.
    """
    model = tiny_model(300, tie_word_embeddings=tied)
    body = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
    samples = [Encoded([5] * 7, [5] * 3), Encoded([5] * 16, [5] * 4)]
    weights = 2 * body * 30 + 2 * 32 * 300 * 7
    # Scores and sums of values: two products of T x 32 x T, in each block.
    attention = 2 * 2 * 2 * 32 * (10**2 + 20**2)
    assert flops(model, samples) == weights + attention
    assert flops(model, samples, loras=1000) == weights + attention + 2 * 1000 * 30
    assert flops(model, samples, backward=True) == 2 * weights + 3 * attention
    both = flops(model, samples, backward=True, checkpointing=True)
    assert both == 3 * weights + 4 * attention


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_as_torch_counts_it(checkpointing: bool) -> None:
    base = deep_base(checkpointing=checkpointing)
    shapes = shapes_of(base.model, "all-linear", 4)
    counted = counters.flops(lambda: train(base, shapes))
    said = flops(base.model, FLAT, shapes.width, backward=True, checkpointing=checkpointing)
    assert said == pytest.approx(counted, rel=0.1)


def test_likelihoods_as_torch_counts_them() -> None:
    base = deep_base()
    own = random_lora(linear_shapes(base.model), 3, 0.5, 0)
    below = stacked([own] * len(SAMPLES))

    def parts(users: Sequence[int]) -> tuple[LoraBatch, None]:
        return below.of(users), None

    with grouped(base.model, [*below.layers]) as layers:
        counted = counters.flops(partial(log_likelihoods, base, layers, SAMPLES, parts))
    width = sum(a.numel() + b.numel() for a, b in own.layers.values())
    assert flops(base.model, FLAT, width) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_per_position_as_torch_allocates_them(
    dtype: torch.dtype, checkpointing: bool
) -> None:
    """Of one step. Beside them stand the users' LoRAs, their gradients and AdamW's two moments,
    and both of the former once more by layer."""
    base = deep_base(128, checkpointing)
    base.model.to(dtype)
    shapes = shapes_of(base.model, "all-linear", 2)
    peak = counters.peak_bytes(lambda: train(base, shapes))
    positions = sum(one.length for one in FLAT)
    each = position_bytes(widths_of(base.model), dtype.itemsize, checkpointing)
    beside = 6 * 4 * shapes.width * len(SAMPLES)
    assert positions * each + beside == pytest.approx(peak, rel=1 / 6)


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

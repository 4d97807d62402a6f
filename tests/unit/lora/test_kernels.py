"""Attention over samples end to end, all around torch's kernel, which runs on GPUs only; norms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from tasks.lora import kernels
from tasks.lora.adapters import LoraBatch
from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.forward import label_losses, row_limit, sum_by
from tasks.lora.group_train import Gradients, _AdamW
from tasks.lora.grouped import grouped, shapes_of
from tasks.lora.kernels import fuse_norms, use_varlen
from tasks.lora.packing import ONE_PER_ROW, ONE_PER_USER, pack
from tasks.lora.train import Outcome
from tests.unit.lora.group_case import close, group
from tests.unit.lora.helpers import MakeBase, model_of, sample, tiny_base, training
from tests.unit.lora.peft_reference import likelihood

USERS = [
    [sample(10 * u + i, 2 + 5 * i, 1 + i % 4) for i in range(n)] for u, n in enumerate((5, 2, 1))
]


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, of_keys: Tensor, most: int, _: int, *,
    scale: float, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """What torch's documentation says of the kernel: [T, heads, d], window (-1, 0) is causal."""
    assert window_size == (-1, 0)
    assert ends is of_keys
    assert (ends.dtype, int(ends[0]), int(ends[-1])) == (torch.int32, 0, len(q))
    lengths = ends.diff()
    assert int(lengths.min()) > 0
    assert int(lengths.max()) == most
    parts = [
        scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in some), is_causal=True, scale=scale
        )
        for some in zip(*(x.split(lengths.tolist()) for x in (q, k, v)), strict=True)
    ]
    return torch.cat([part.transpose(0, 1) for part in parts])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands in for the kernel; the longest sample of each call."""
    calls: list[int] = []

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(args[5])
        return one_by_one(*args, **options)

    monkeypatch.setattr(kernels.varlen, "varlen_attn", counted)
    return calls


def end_to_end(base: Base) -> Base:
    return replace(base, end_to_end=use_varlen(base.model))


def test_losses_are_transformers_own(kernel: list[int], base: Base) -> None:
    """Each sample alone through the model; a row per user is padded to the longest user's."""
    wanted = torch.tensor([-likelihood(base.model, item) for own in USERS for item in own])
    other = end_to_end(tiny_base())
    limit = row_limit(other, USERS)
    packed = pack(USERS, 0, limit)
    assert packed.input_ids.shape == (3, sum(one.length for one in USERS[0]))
    with torch.no_grad():
        got = sum_by(label_losses(other, packed), packed.sample, 8)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
    longest = packed.input_ids.shape[1] - USERS[2][0].length  # what is left of the last user's row
    assert kernel == [longest] * 2


def test_where_it_is_not_right(base: Base) -> None:
    """Samples with choices keep the mask, and so do models that were not told to."""
    other = end_to_end(tiny_base())
    assert row_limit(other, USERS) == ONE_PER_USER
    assert row_limit(base, USERS) != ONE_PER_USER
    branched = [[Encoded([5, 6, 7], [], choices=([8], [9, 4]))]]
    limit = row_limit(other, branched)
    assert limit == ONE_PER_ROW
    with torch.no_grad():
        got, wanted = (label_losses(one, pack(branched, 0, limit)) for one in (other, base))
    torch.testing.assert_close(got, wanted)


def test_answers_are_those_of_sdpa(base: Base) -> None:
    """With a cache and padding on the left."""
    ids = torch.tensor([[0, 0, 5, 80, 33], [290, 7, 112, 64, 3]])
    mask = (ids != 0).long()
    got, wanted = (
        one.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        for one in (end_to_end(tiny_base()), base)
    )
    assert got.tolist() == wanted.tolist()


def test_training_gives_the_same_loras(kernel: list[int], fresh_base: MakeBase) -> None:
    wanted, _ = group(fresh_base()).together()
    got, _ = group(end_to_end(fresh_base())).together()
    close(got, wanted, 1e-5)
    assert kernel


def test_the_host_waits_once_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients are made on the device `meta`, which has no numbers: who asks for one,
    and so would wait for a GPU, fails. The optimiser asks once, for all norms and losses."""
    monkeypatch.setattr(kernels.varlen, "varlen_attn", lambda q, k, v, *_, **__: q * k * v)
    base = end_to_end(tiny_base())
    nowhere = torch.device("meta")
    base = replace(base, model=base.model.to(nowhere), device=nowhere)
    shapes = shapes_of(base.model, "all-linear", 2)
    flat = torch.zeros(len(USERS), shapes.width, device=nowhere)
    outcome = Outcome(flat, [[] for _ in USERS], [0] * len(USERS))
    with grouped(base.model, list(shapes.sizes)) as layers:
        split = lambda _, rows: LoraBatch(shapes.split(rows), 1.0)  # noqa: E731
        work = Gradients(base, layers, split, None, 60, outcome)
        losses = work.fill(torch.zeros_like(flat), flat, dict(enumerate(USERS)))
    assert losses.device == nowhere
    assert outcome.tokens == [sum(one.length for one in own) for own in USERS]
    asked = []
    monkeypatch.setattr(Tensor, "tolist", lambda _: asked.append(1) or [[1.0] * 3] * 2)
    adam = _AdamW(flat, training())
    failed, _ = adam.step(dict.fromkeys(range(3), 1e-3), losses)
    assert (failed, len(asked)) == ([], 1)


def test_models_whose_attention_is_another_stay() -> None:
    """Gemma 2 caps its scores, gpt-oss has sinks, StableLM's layers do not hand over where samples
    end; heads of 12 do not fit the kernel."""
    ids = torch.tensor([[3, 5, 7]])
    small = {"vocab_size": 30, "hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1}
    for config in (
        Gemma2Config(**small, num_attention_heads=2, num_key_value_heads=2, head_dim=8),
        GptOssConfig(**small, num_attention_heads=2, num_key_value_heads=2, head_dim=8),
        StableLmConfig(**small, num_attention_heads=3, num_key_value_heads=3),
        LlamaConfig(**small, num_attention_heads=2),
    ):
        model = AutoModelForCausalLM.from_config(config)
        before = model(input_ids=ids).logits
        assert not use_varlen(model)
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_losses_and_gradients_of_more_models(kernel: list[int], base: Base, kind: Any) -> None:
    """Against the masked rows of the same model: losses, and gradients of its embeddings."""
    model = model_of(kind, hidden_size=32, num_attention_heads=4, sliding_window=None)
    model.requires_grad_(False)
    weight = model.get_input_embeddings().weight.requires_grad_()
    these = Base(model, base.tokenizer, base.device, 60)
    weights, found = torch.arange(1.0, 9.0), []
    for _ in range(2):
        packed = pack(USERS, 0, row_limit(these, USERS))
        losses = sum_by(label_losses(these, packed), packed.sample, 8)
        found.append((losses.detach(), *torch.autograd.grad((losses * weights).sum(), [weight])))
        these = end_to_end(these)
    assert len(kernel) == 2
    for got, wanted in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_with_torchs_norms_the_model_is_the_same(kind: Any, dtype: torch.dtype) -> None:
    ids = torch.tensor([[5, 80, 33, 290, 7, 112, 64, 3]])
    model = model_of(kind)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    model.to(dtype)
    names = set(model.state_dict())
    states = torch.randn(1, 5, 16).to(dtype)
    norm = model.model.layers[1].input_layernorm
    with torch.no_grad():
        wanted, logits = norm(states), model(ids).logits
        fuse_norms(model)
        got, fused = model.model.layers[1].input_layernorm(states), model(ids).logits
    # Every norm, and no rounding more than transformers' own two.
    assert not [one for one in model.modules() if type(one).__name__.endswith("eRMSNorm")]
    assert {type(one).__name__ for one in model.modules() if "Norm" in type(one).__name__} == {
        "RMSNorm"
    }
    torch.testing.assert_close(got, wanted, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=0)
    if dtype == torch.float32:
        torch.testing.assert_close(fused, logits, rtol=1e-5, atol=1e-5)
    assert set(model.state_dict()) == names


def test_norms_that_compute_otherwise_stay() -> None:
    """Gemma's weight has 1 added."""
    config = Gemma2Config(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    fuse_norms(model)
    assert type(model.model.norm).__name__ == "Gemma2RMSNorm"

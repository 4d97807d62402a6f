"""torch's norms in place of transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from tasks.lora.norms import fuse
from tests.unit.lora.helpers import model_of

IDS = torch.tensor([[5, 80, 33, 290, 7, 112, 64, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_the_model_is_the_same(kind: Any, dtype: torch.dtype) -> None:
    model = model_of(kind)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    model.to(dtype)
    names = set(model.state_dict())
    states = torch.randn(1, 5, 16).to(dtype)
    norm = model.model.layers[1].input_layernorm
    with torch.no_grad():
        wanted, logits = norm(states), model(IDS).logits
        fuse(model)
        got, fused = model.model.layers[1].input_layernorm(states), model(IDS).logits
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
    fuse(model)
    assert type(model.model.norm).__name__ == "Gemma2RMSNorm"

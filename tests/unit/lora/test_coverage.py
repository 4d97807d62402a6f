"""What a LoRA is on, counted by hand: width 32, feed-forward 48, 2 layers, 300 tokens."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from tasks.errors import InputError
from tasks.lora.base import without_weights
from tasks.lora.targets import coverage
from tests.unit.lora.test_architectures import ARCHITECTURES

# q and o [32, 32], k and v [16, 32], in two layers.
ATTENTION = 2 * (2 * 32 * 32 + 2 * 16 * 32)
# Two norms per layer and the last one; the two tables of embeddings.
NORMS, TABLES = 5 * 32, 2 * 300 * 32
MLP = 2 * 3 * 32 * 48


def model(name: str, **changes: Any) -> Any:
    sizes = {"vocab_size": 300, "tie_word_embeddings": False, "pad_token_id": 0}
    return without_weights(AutoConfig.for_model(name, **ARCHITECTURES[name] | sizes | changes))


def test_llama() -> None:
    found = coverage(model("llama"), "all-linear")
    total = ATTENTION + MLP + NORMS + TABLES
    assert (found.adapted, found.linear) == (14, 14)
    assert found.share == pytest.approx((ATTENTION + MLP) / total, rel=1e-12)
    assert found.text() == "a LoRA on 14 of 14 linear layers, 44% of the parameters"


def test_tied_embeddings_count_once() -> None:
    found = coverage(model("llama", tie_word_embeddings=True), "all-linear")
    total = ATTENTION + MLP + NORMS + TABLES / 2
    assert found.share == pytest.approx((ATTENTION + MLP) / total, rel=1e-12)


def test_some_layers_only() -> None:
    """OPPU's query, key and value: 2 x (32 x 32 + 2 x 16 x 32)."""
    found = coverage(model("llama"), ["q_proj", "k_proj", "v_proj"])
    assert (found.adapted, found.linear) == (6, 14)
    assert found.share == pytest.approx(2 * 2048 / (ATTENTION + MLP + NORMS + TABLES), rel=1e-12)
    with pytest.raises(InputError, match="no linear layer"):
        coverage(model("llama"), ["query"])


def test_mixtrals_experts_have_none() -> None:
    """Per layer four experts of three matrices [48, 32], and a router [4, 32]."""
    found = coverage(model("mixtral"), "all-linear")
    experts, routers = 4 * MLP, 2 * 4 * 32
    total = ATTENTION + experts + routers + NORMS + TABLES
    assert (found.adapted, found.linear) == (8, 8)
    assert found.share == pytest.approx(ATTENTION / total, rel=1e-12)
    assert found.bare == {
        "MixtralExperts": (2, pytest.approx(experts / total, rel=1e-12)),
        "MixtralTopKRouter": (2, pytest.approx(routers / total, rel=1e-12)),
    }
    assert found.text() == (
        "a LoRA on 8 of 8 linear layers, 10% of the parameters; none on the bare parameters of "
        "2 MixtralExperts (59%), 2 MixtralTopKRouter (under 1%)"
    )


def test_qwen3s_experts_have_none() -> None:
    """Experts of three matrices [24, 32]; norms [8] of queries and keys."""
    found = coverage(model("qwen3_moe"), "all-linear")
    experts, routers = 2 * 4 * 3 * 24 * 32, 2 * 4 * 32
    total = ATTENTION + experts + routers + NORMS + 2 * 2 * 8 + TABLES
    assert (found.adapted, found.linear) == (8, 8)
    assert found.share == pytest.approx(ATTENTION / total, rel=1e-12)
    assert found.bare["Qwen3MoeExperts"] == (2, pytest.approx(experts / total, rel=1e-12))


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "gemma3_text", "falcon"])
def test_no_other_model_has_bare_matrices(name: str) -> None:
    assert coverage(model(name), "all-linear").bare == {}

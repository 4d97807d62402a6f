"""Which base models are taken: those tried here against stock PEFT, and none without attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.errors import InputError
from tasks.lora.answer import answer_users, log_likelihoods
from tasks.lora.base import Base, attention_only, check_causal, load_base
from tasks.lora.grouped import grouped
from tasks.lora.tiny import train_tokenizer
from tests.unit.lora.group_case import BOUND, CASES, SEEDS, Group, histories
from tests.unit.lora.helpers import TEXTS, stacked
from tests.unit.lora.peft_reference import answer_ids, attached, largest_difference, likelihood

WIDE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
FALCON = {
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "new_decoder_architecture": True,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True}
QWEN3_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Gemma's windows are shorter than the samples, so that they count.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "mistral": WIDE | {"sliding_window": None},
    "mixtral": WIDE | {"num_local_experts": 4, "sliding_window": None},
    "qwen2": WIDE,
    "qwen3": WIDE,
    "qwen3_moe": WIDE | QWEN3_MOE,
    "gemma2": WIDE | {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": WIDE | {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "phi3": WIDE,
    "gpt_neox": WIDE,
    "opt": WIDE | OPT,
    "falcon": FALCON,
    "gpt2": GPT,
}
# Layers with a state, of all or some layers; sizes that differ; an encoder.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({}, "has layers of the kind linear_attention"),
    "mamba2": ({}, "has layers of the kind linear_attention"),
    "falcon_mamba": ({}, "has layers of the kind linear_attention"),
    "rwkv": ({}, "has no attention heads"),
    "jamba": ({}, "has layers of the kind linear_attention"),
    "bamba": ({}, "has layers of the kind linear_attention"),
    "zamba": ({}, "has layers of the kind hybrid"),
    "falcon_h1": ({}, "has layers of the kind hybrid"),
    "recurrent_gemma": ({}, "has layers of the kind linear_attention"),
    "granitemoehybrid": ({}, "has layers of the kind linear_attention"),
    "qwen3_next": ({}, "has layers of the kind linear_attention"),
    "lfm2": ({"full_attn_idxs": [1]}, "has layers of the kind conv"),
    "gemma4_text": ({}, "has layers of unlike sizes"),
    "bart": ({}, "has an encoder"),
    "t5": ({}, "has an encoder"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attention_is_taken(name: str) -> None:
    attention_only("model", AutoConfig.for_model(name, **ARCHITECTURES[name]))


@pytest.mark.parametrize("name", REFUSED)
def test_other_layers_are_refused(name: str, tmp_path: Path) -> None:
    """Before the weights are read: the file of them is empty."""
    options, why = REFUSED[name]
    AutoConfig.for_model(name, **options).save_pretrained(tmp_path)
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=f"its architecture, {name}, {why}; ") as caught:
        load_base(tmp_path, max_tokens=32, device="cpu")
    assert "\n" not in str(caught.value)


def base_of(name: str, sizes: dict[str, Any] | None = None) -> Base:
    """A random model, ten times wider than usual: a wrong layer or scale shows."""
    tokenizer = train_tokenizer(TEXTS, 300)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    wide = {"vocab_size": len(tokenizer), "initializer_range": 0.2, **tokens}
    dropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0}
    config = AutoConfig.for_model(name, **(sizes or ARCHITECTURES[name]), **wide, **dropped)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config)
    return Base(model.eval().requires_grad_(False), tokenizer, torch.device("cpu"), 128)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_engine_is_stock_peft(name: str) -> None:
    """Three users together: their LoRAs, log-likelihoods and answers are those of each alone."""
    base = base_of(name)
    check_causal(base)
    options = CASES["constant, warm-up, bare base"][0]
    these = Group(base, options, histories()[:3], list(SEEDS[:3]))
    trained, _ = these.together()
    loras = [trained[user] for user in range(3)]
    with grouped(base.model, list(loras[0].layers)) as layers:

        def parts(users: Any) -> Any:
            return None, stacked([loras[user] for user in users])

        scores = log_likelihoods(base, layers, these.samples, parts)
        answers = answer_users(base, layers, these.samples, parts, 6)
    for user, own in enumerate(these.samples):
        assert largest_difference(loras[user], these.alone(user)[0]) <= BOUND[torch.float32]
        stock = attached(base.model, own=loras[user])
        wanted = [likelihood(stock, item) for item in own]
        assert scores[user].tolist() == pytest.approx(wanted, rel=1e-4)
        ids = [answer_ids(stock, item.prompt, 6) for item in own]
        texts = base.tokenizer.batch_decode(ids, skip_special_tokens=True)
        assert answers[user] == [text.strip() for text in texts]

"""A tiny random Llama, random LoRAs for it, and sums worked out without the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tasks.lora.adapters import Lora, LoraBatch
from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.tiny import train_tokenizer
from tasks.lora.train import Training

TEXTS = [
    "a film about a ship that never comes back, comedy",
    "two brothers inherit a farm and a debt, classic",
    "the robots learn to dream and to lie, sci-fi",
    "an old letter changes the life of a baker, romance",
]
HIDDEN, LAYERS = 32, 2
# The fixture `fresh_base`.
MakeBase = Callable[[], Base]


def tiny_model(vocabulary: int, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Grouped-query attention, so q_proj and k_proj differ in shape as in Llama 3.

    The init is ten times wider than usual: predictions are then far from uniform, and a wrong
    layer or a wrong scale shows in the logits.
    """
    options: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(options | changes))).eval().requires_grad_(False)


def model_of(kind: Any, **changes: Any) -> Any:
    """A random model of two layers, by a kind of configuration; draws from seed 0 on."""
    options = {
        "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**(options | changes))).eval()


def tiny_base(max_tokens: int = 128, seed: int = 0, **changes: Any) -> Base:
    tokenizer = train_tokenizer(TEXTS, 300)
    model = tiny_model(len(tokenizer), seed, **changes)
    return Base(model, tokenizer, torch.device("cpu"), max_tokens)


def linear_shapes(model: Any) -> dict[str, tuple[int, int]]:
    """Layer name -> (out, in) of every linear layer except the LM head."""
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def random_lora(
    shapes: dict[str, tuple[int, int]], rank: int, scale: float, seed: int, spread: float = 0.3
) -> Lora:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) * spread

    layers = {name: (draw(rank, fan), draw(out, rank)) for name, (out, fan) in shapes.items()}
    return Lora(layers, scale)


def added_to(model: Any, *loras: Lora) -> None:
    """Add the LoRAs' updates to the plain model's weights (Hu et al. 2021, equation 3)."""
    with torch.no_grad():
        for lora in loras:
            for name, (a, b) in lora.layers.items():
                model.get_submodule(name).weight += lora.scale * b @ a


def sample(seed: int, prompt: int, answer: int, vocabulary: int = 300) -> Encoded:
    """Random token ids (no special ones); the answer ends with the end-of-text token, 2."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (prompt + answer - 1,), generator=generator).tolist()
    return Encoded(ids[:prompt], [*ids[prompt:], 2])


def training(**changes: Any) -> Training:
    options: dict[str, Any] = {
        "learning_rate": 1e-2,
        "epochs": 2,
        "batch_size": 1,
        "accumulation": 1,
        "schedule": "cosine",
        "warmup_share": 0.1,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
    }
    return Training(**(options | changes))


def same(left: Lora, right: Lora) -> bool:
    """Bitwise equality."""
    return left.scale == right.scale and equal_tensors(left, right)


def equal_tensors(left: Lora, right: Lora) -> bool:
    return left.layers.keys() == right.layers.keys() and all(
        torch.equal(left.layers[name][side], right.layers[name][side])
        for name in left.layers
        for side in (0, 1)
    )


def stacked(loras: Sequence[Lora]) -> LoraBatch:
    """The users' LoRAs as the grouped layers take them, [U, r, in] and [U, out, r]."""
    layers = {
        name: (
            torch.stack([lora.layers[name][0] for lora in loras]),
            torch.stack([lora.layers[name][1] for lora in loras]),
        )
        for name in loras[0].layers
    }
    return LoraBatch(layers, loras[0].scale)


def delta(lora: Lora, layer: str) -> Tensor:
    """The update `scale * B @ A` [out, in] of a layer (Hu et al. 2021, section 4.1), float64."""
    a, b = lora.layers[layer]
    return lora.scale * (b.double() @ a.double())

"""The models and users that are measured: four shapes of Llama, random weights, random tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.lora.base import pick_device
from tasks.lora.batches import Encoded
from tasks.lora.tiny import train_tokenizer
from tasks.lora.train import Training

# `tokens` per item on average; `batch` x `accumulation` items per optimiser step; answers of up to
# `new` tokens; `stream` users where a stream is asked for and no number is given.
SHAPES: dict[str, dict[str, Any]] = {
    "embedded": {
        "hidden": 64, "layers": 2, "heads": 4, "wide": 170, "vocabulary": 2000,
        "tokens": 15, "items": 10, "batch": 4, "accumulation": 1, "epochs": 5, "rank": 8,
        "new": 4, "stream": 10_000,
    },
    "40m": {
        "hidden": 512, "layers": 8, "heads": 8, "wide": 1376, "vocabulary": 8000,
        "tokens": 256, "items": 10, "batch": 2, "accumulation": 1, "epochs": 1, "rank": 8,
        "new": 8, "stream": 1024,
    },
    "1b": {
        "hidden": 2048, "layers": 16, "heads": 32, "wide": 8192, "vocabulary": 32000,
        "tokens": 300, "items": 10, "batch": 2, "accumulation": 4, "epochs": 1, "rank": 8,
        "new": 16, "stream": 2048,
    },
    "8b": {
        "hidden": 4096, "layers": 32, "heads": 32, "wide": 14336, "vocabulary": 32000,
        "tokens": 300, "items": 10, "batch": 2, "accumulation": 4, "epochs": 1, "rank": 8,
        "new": 16, "stream": 1024,
    },
}  # fmt: skip
LEARNING_RATE = 5e-3


def build(shape: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
    """The model and tokenizer of `make`, written to `folder`."""
    model, tokenizer = make(shape, dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make(shape: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    """A Llama by random init, on the GPU where there is one, and a byte-level tokenizer."""
    tokenizer = train_tokenizer(["a film of a quiet harbour"], 300)
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["wide"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # On the GPU: drawing 8 billion numbers takes a core minutes.
        with torch.device(pick_device("auto")):
            return LlamaForCausalLM(config), tokenizer
    finally:
        torch.set_default_dtype(usual)


def training_of(shape: dict[str, Any]) -> Training:
    """How each user's stacked LoRA is trained, by engine and opponents alike."""
    return Training(
        learning_rate=LEARNING_RATE,
        epochs=shape["epochs"],
        batch_size=shape["batch"],
        accumulation=shape["accumulation"],
        schedule="cosine",
        warmup_share=0.1,
        max_grad_norm=1.0,
        weight_decay=0.0,
    )


def make_users(shape: dict[str, Any], seed: int = 1) -> Iterator[list[Encoded]]:
    """Users without end, of random tokens; lengths vary as LaMP's do (a quarter around the mean).

    Each has `items` samples, whose answers are one token and the end of the text.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        own = []
        for _ in range(shape["items"]):
            ids = _tokens(shape, generator)
            own.append(Encoded(ids[:-2], [*ids[-2:-1], 2]))
        yield own


def make_questions(shape: dict[str, Any], users: int, each: int) -> list[list[Encoded]]:
    """`each` questions for every user, as long as the samples are."""
    generator = torch.Generator().manual_seed(3)
    return [
        [Encoded(_tokens(shape, generator)[:-2], []) for _ in range(each)] for _ in range(users)
    ]


def _tokens(shape: dict[str, Any], generator: torch.Generator) -> list[int]:
    spread = float(torch.randn(1, generator=generator)) * 0.25
    length = max(4, int(shape["tokens"] * (1 + spread)))
    return torch.randint(3, shape["vocabulary"], (length,), generator=generator).tolist()

"""The tiny Llama that the embedded preset trains from random init, with its own tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks.lora.base import ANSWER_ROOM, Base
from tasks.lora.batches import encode
from tasks.lora.train import Recipe, Trained, fit


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: no text is unknown to it, and decoding gives the text back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def train_tiny(
    folder: Path,
    questions: Sequence[tuple[str, str]],
    *,
    hidden: int,
    layers: int,
    heads: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    vocabulary: int,
    max_tokens: int,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train on `questions` (prompt, answer), save model and tokenizer to `folder`.

    The loss is that of the answers, as everywhere else: `steps` optimiser steps of `batch_size`.
    """
    tokenizer = train_tokenizer([f"{prompt} {answer}" for prompt, answer in questions], vocabulary)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max(2 * max_tokens, max_tokens + ANSWER_ROOM),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
        model.to(device)
    base = Base(model, tokenizer, device, max_tokens)
    samples = [encode(base, prompt, answer) for prompt, answer in questions]
    # Samples are repeated, or cut, to exactly the steps asked for.
    generator = torch.Generator().manual_seed(seed)
    wanted = steps * batch_size
    order: list[int] = []
    while len(order) < wanted:
        order += torch.randperm(len(samples), generator=generator).tolist()
    recipe = Recipe(learning_rate, 1, batch_size, 1, "cosine", 0.05, 1.0, 0.01)
    chosen = [samples[i] for i in order[:wanted]]
    trained = fit(base, model, list(model.parameters()), chosen, recipe, seed, progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return trained

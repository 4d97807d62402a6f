"""The tiny Llama that the embedded preset trains from random init, with its own tokenizer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tasks.errors import InputError
from tasks.lora.base import ANSWER_ROOM, Base
from tasks.lora.batches import encode
from tasks.lora.checkpoint import Checkpoint
from tasks.lora.train import Trained, Training, fit

# Batches whose samples are sorted by length together.
WINDOW = 16


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: it knows every text, and decoding gives exactly the text back."""
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


def tiny_config(
    hidden: int, layers: int, heads: int, vocabulary: int, max_tokens: int
) -> LlamaConfig:
    """The tiny model's shape."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max(2 * max_tokens, max_tokens + ANSWER_ROOM),
        tie_word_embeddings=False,
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
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Train on `questions` (prompt, answer), save model and tokenizer to `folder`.

    The loss is on the answers. There are `steps` optimiser steps of `batch_size` questions. Raises
    InputError if the training diverges.
    """
    tokenizer = train_tokenizer([f"{prompt} {answer}" for prompt, answer in questions], vocabulary)
    config = tiny_config(hidden, layers, heads, len(tokenizer), max_tokens)
    config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    base = Base(model.to(device), tokenizer, device, max_tokens)
    samples = [encode(base, prompt, answer) for prompt, answer in questions]
    order = batches([len(sample.prompt) for sample in samples], steps, batch_size, seed)
    options = Training(learning_rate, 1, batch_size, 1, "cosine", 0.05, 1.0, 0.01)
    step_batches = [[batch] for batch in order]
    parameters = list(model.parameters())
    trained = fit(base, parameters, samples, step_batches, options, progress, checkpoint)
    if trained.failed:
        raise InputError(f"base.tiny: {trained.failed}; lower base.tiny.learning_rate")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return trained


def batches(lengths: Sequence[int], steps: int, size: int, seed: int) -> list[list[int]]:
    """`steps` batches of `size` sample indices: all samples in random order, again and again.

    In a window of WINDOW batches, those of similar length share a batch: little is padded then. The
    batches of a window stand in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * size:
        order += torch.randperm(len(lengths), generator=generator).tolist()
    order = order[: steps * size]
    mixed: list[list[int]] = []
    for start in range(0, len(order), WINDOW * size):
        window = sorted(order[start : start + WINDOW * size], key=lambda i: (lengths[i], i))
        parts = [window[first : first + size] for first in range(0, len(window), size)]
        mixed += [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]
    return mixed

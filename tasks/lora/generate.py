"""Answering: greedy decoding of prompts in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tasks.lora.base import Base
from tasks.lora.batches import Encoded, collate


@torch.no_grad()
def generate(
    base: Base,
    model: Any,
    samples: Sequence[Encoded],
    max_new_tokens: int,
    batch_size: int,
    keep_order: bool = False,
) -> list[str]:
    """The greedy answer of `model` to each sample's prompt, in order, without special tokens.

    Batches are of samples of like length, unless `keep_order` says that rows have their place.
    """
    order = list(range(len(samples)))
    if not keep_order:
        order.sort(key=lambda i: len(samples[i].prompt))
    answers = [""] * len(samples)
    # What training taught as the end, and what the checkpoint ends a turn with (one or several).
    own = getattr(base.model.generation_config, "eos_token_id", None)
    ends = sorted(
        {base.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    )
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate(base, [Encoded(samples[i].prompt, []) for i in chosen])
        output = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            # A checkpoint's generation_config may ask for sampling or penalties; LaMP is greedy.
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            pad_token_id=base.tokenizer.pad_token_id,
            eos_token_id=ends,
        )
        texts = base.tokenizer.batch_decode(
            output[:, batch.input_ids.shape[1] :], skip_special_tokens=True
        )
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text.strip()
    return answers

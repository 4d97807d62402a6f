"""Prompts and answers as token batches.

Batches are padded on the left, so that all answers end at the last position: one slice of the
last positions then holds every label, and only that slice goes through the LM head.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks.lora.base import Base, special_tokens

_PLACEHOLDER = "the text of the user"
# What some templates look at: a day, which must not be today's, or no two days give the same
# numbers (this one is Llama 3.1's own default); and whether the model thinks before it answers.
_TEMPLATE_OPTIONS = {"date_string": "26 Jul 2024", "enable_thinking": False}


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sample; `answer` is empty for a question that is to be answered."""

    prompt: list[int]
    answer: list[int]
    truncated: bool = False


def encode(base: Base, prompt: str, answer: str | None) -> Encoded:
    """Tokenise a prompt (through the chat template where the tokenizer has one) and an answer.

    The answer ends with the token that ends a turn (`Base.end_of_answer`). What exceeds
    `base.max_tokens` is cut from the start of the prompt, after a leading begin-of-text token: the
    question stands at the end.
    """
    tokenizer = base.tokenizer
    if tokenizer.chat_template:
        ids = _through_template(tokenizer, prompt)
        answer_text = answer
    else:
        # Text that looks like a special token ("</s>") is text: it came from a user.
        ids = tokenizer(prompt, split_special_tokens=True)["input_ids"]
        # Some tokenizers close every text; a question must stay open for its answer.
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        answer_text = None if answer is None else " " + answer
    # A label is predicted from the token before it, so there has to be one.
    ids = ids or [tokenizer.eos_token_id]
    labels: list[int] = []
    if answer_text is not None:
        labels = tokenizer(answer_text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        labels = [*labels, base.end_of_answer]
    truncated = len(ids) + len(labels) > base.max_tokens
    if truncated and len(labels) > base.max_tokens // 2:
        # A question too long for what the answer leaves: the answer keeps half of the room.
        most = max(base.max_tokens // 2, base.max_tokens - len(ids))
        labels = [*labels[: most - 1], base.end_of_answer]
    room = base.max_tokens - len(labels)
    if len(ids) > room:
        head = ids[:1] if ids[0] == tokenizer.bos_token_id else []
        ids = head + ids[len(ids) - room + len(head) :]
    return Encoded(ids, labels, truncated)


def _through_template(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt as one user turn. Special tokens of the template are; in the user's text they
    are text, so a text that holds one is tokenised apart from the template around it."""
    risky = any(token in prompt for token in special_tokens(tokenizer))
    content = _PLACEHOLDER if risky else prompt
    message = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=True, **_TEMPLATE_OPTIONS
    )
    before, _, after = text.partition(content) if risky else (text, "", "")
    ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    if risky:
        ids += tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids += tokenizer(after, add_special_tokens=False)["input_ids"]
    return ids


@dataclass(frozen=True)
class Batch:
    """`input_ids`, `attention_mask`, `position_ids` [B, T]; `labels` [B, keep - 1], -100 for none.

    `keep` is the number of last positions whose logits are needed: `labels[:, j]` is predicted
    at position `T - keep + j`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    keep: int


def collate(base: Base, samples: Sequence[Encoded]) -> Batch:
    """Pad `samples` on the left to one batch on the base model's device."""
    rows = [sample.prompt + sample.answer for sample in samples]
    width = max(len(row) for row in rows)
    keep = max(len(sample.answer) for sample in samples) + 1
    ids = torch.full((len(rows), width), base.tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), keep - 1), -100, dtype=torch.long)
    for index, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
        if sample.answer:
            labels[index, keep - 1 - len(sample.answer) :] = torch.tensor(sample.answer)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    ids, mask, position, labels = (item.to(base.device) for item in (ids, mask, position, labels))
    return Batch(ids, mask, position, labels, keep)


def answer_logits(model: Any, batch: Batch) -> Tensor:
    """Logits [B, keep - 1, V] at the positions that predict `batch.labels`."""
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = batch.keep
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        **options,
    )
    return output.logits[:, -batch.keep : -1, :]

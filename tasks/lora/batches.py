"""Prompts and answers as tokens, and as batches padded on the left.

So all answers end at the last position. One slice holds every label, and only this slice goes
through the LM head.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tasks.lora.base import Base, special_tokens

_PLACEHOLDER = "the text of the user"
# What some templates read: the date (a fixed one, Llama 3.1's default: today's would change the
# numbers), and whether the model thinks before it answers.
_TEMPLATE_OPTIONS = {"date_string": "26 Jul 2024", "enable_thinking": False}


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sample; a question has no `answer`.

    choices: possible answers, in place of `answer`. They share the prompt, which runs once.
    """

    prompt: list[int]
    answer: list[int]
    truncated: bool = False
    choices: tuple[list[int], ...] = ()

    @property
    def length(self) -> int:
        """Tokens that are run. The last token of a choice is only predicted."""
        return len(self.prompt) + len(self.answer) + sum(len(one) - 1 for one in self.choices)

    @property
    def labels(self) -> int:
        """Tokens that are predicted."""
        return sum(map(len, self.choices or [self.answer]))


# Users' samples, user by user.
PerUser = Sequence[Sequence[Encoded]]


def encode(base: Base, prompt: str, answer: str | None) -> Encoded:
    """Tokenise a prompt (through the chat template, if any) and an answer with its end.

    Tokens beyond `base.max_tokens` are cut from the start of the prompt, but a begin-of-text token
    stays: the question stands at the end.
    """
    tokenizer = base.tokenizer
    if tokenizer.chat_template:
        ids = _through_template(tokenizer, prompt)
    else:
        # Text that looks like a special token ("</s>") is text: it came from a user.
        ids = tokenizer(prompt, split_special_tokens=True)["input_ids"]
        # Some tokenizers close every text; a question must stay open for its answer.
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
    # A label is predicted from the token before it, so there has to be one.
    ids = ids or [tokenizer.eos_token_id]
    labels: list[int] = []
    if answer is not None:
        text = answer if tokenizer.chat_template else " " + answer
        words = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        labels = [*words, base.end_of_answer]
    most = base.max_tokens
    truncated = len(ids) + len(labels) > most
    if truncated and len(labels) > most // 2:
        # After a long question half of the room is the answer's.
        labels = [*labels[: max(most // 2, most - len(ids)) - 1], base.end_of_answer]
    room = most - len(labels)
    if len(ids) > room:
        head = ids[:1] if ids[0] == tokenizer.bos_token_id else []
        ids = head + ids[len(ids) - room + len(head) :]
    return Encoded(ids, labels, truncated)


def _through_template(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt as one user turn. If it has special tokens in it, they are tokenised as text."""
    risky = any(token in prompt for token in special_tokens(tokenizer))
    content = _PLACEHOLDER if risky else prompt
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=False, add_generation_prompt=True, **_TEMPLATE_OPTIONS,
    )  # fmt: skip
    before, _, after = text.partition(content) if risky else (text, "", "")
    ids: list[int] = tokenizer(before, add_special_tokens=False)["input_ids"]
    if risky:
        ids += tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids += tokenizer(after, add_special_tokens=False)["input_ids"]
    return ids


@dataclass(frozen=True)
class Batch:
    """input_ids, attention_mask, position_ids [B, T]; labels [B, keep - 1], -100 for none.

    keep: the number of last positions with logits; position T - keep + j predicts labels[:, j].
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    keep: int


def collate(base: Base, samples: Sequence[Encoded]) -> Batch:
    """Pad `samples` on the left to one batch on the base model's device."""

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        return pad_sequence(tensors, True, fill, "left").to(base.device)

    mask = padded([[1] * sample.length for sample in samples], 0)
    return Batch(
        input_ids=padded([one.prompt + one.answer for one in samples], base.tokenizer.pad_token_id),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        labels=padded([sample.answer for sample in samples], -100),
        keep=max(len(sample.answer) for sample in samples) + 1,
    )


def answer_logits(model: Any, batch: Batch) -> Tensor:
    """Logits [B, keep - 1, V] at the positions that predict `batch.labels`."""
    options = {"logits_to_keep": batch.keep} if takes(model, "logits_to_keep") else {}
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        **options,
    )
    logits: Tensor = output.logits[:, -batch.keep : -1, :]
    return logits


def takes(model: Any, argument: str) -> bool:
    """Whether a model's forward pass knows an argument."""
    return argument in inspect.signature(model.forward).parameters

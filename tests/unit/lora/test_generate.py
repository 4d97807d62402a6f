"""Greedy answers, against the argmax worked out token by token on the whole text, no cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tasks.lora import adapters
from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.generate import generate
from tests.unit.lora.helpers import linear_shapes, random_lora, sample

MakeBase = Callable[[], Base]
QUESTIONS = [
    Encoded(sample(seed, length, 1).prompt, [])
    for seed, length in enumerate([3, 21, 8, 8, 14, 5, 30])
]
# A padding token inside a prompt is part of it: where the end of text pads, chat templates use it.
QUESTIONS.append(Encoded([40, 0, 0, 41, 0, 42], []))


@torch.no_grad()
def by_hand(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """The argmax continuation, up to and without the end-of-text token."""
    ids = list(prompt)
    for _ in range(count):
        best = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if best == 2:
            break
        ids.append(best)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_answer_like_argmax_by_hand(base: Base, batch_size: int) -> None:
    wanted = [
        base.tokenizer.decode(by_hand(base.model, q.prompt, 9), skip_special_tokens=True).strip()
        for q in QUESTIONS
    ]
    assert len(set(wanted)) == len(QUESTIONS)
    assert generate(base, base.model, QUESTIONS, 9, batch_size) == wanted


def test_active_loras_answer(fresh_base: MakeBase) -> None:
    base = fresh_base()
    plain = generate(base, base.model, QUESTIONS, 6, 4)
    model = adapters.attach(base.model, "merged", 3, 1.0, "all-linear")
    adapters.fill(model, "merged", random_lora(linear_shapes(fresh_base().model), 3, 1.0, 1))
    got = generate(base, model, QUESTIONS, 6, 4)
    assert got != plain
    for question, answer in zip(QUESTIONS, got, strict=True):
        ids = by_hand(model, question.prompt, 6)
        assert answer == base.tokenizer.decode(ids, skip_special_tokens=True).strip()


def ending_model(base: Base, after: int) -> None:
    """Make token `after` be followed by the end of text, and that by something else.

    The head's row of the end of text points along the state after `after`, and stands at a right
    angle to the state after both.
    """
    with torch.no_grad():
        ids = torch.tensor([[after, 2]])
        first, second = base.model.model(input_ids=ids).last_hidden_state[0]
        row = first - (first @ second) / (second @ second) * second
        base.model.lm_head.weight[2] = 50 * row / row.norm()
        assert base.model(input_ids=ids).logits[0].argmax(-1).tolist()[0] == 2
        assert base.model(input_ids=ids).logits[0].argmax(-1).tolist()[1] != 2


def test_stops_at_the_end_of_text(fresh_base: MakeBase) -> None:
    """One answer ends at once, one goes on: each is what it is alone."""
    base = fresh_base()
    ending_model(base, after=77)
    samples = [Encoded([77], []), *QUESTIONS]
    ids = [by_hand(base.model, item.prompt, 12) for item in samples]
    assert ids[0] == []
    assert max(len(tokens) for tokens in ids) > 0
    assert generate(base, base.model, samples, 12, 8) == [
        base.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in ids
    ]


def test_stops_at_the_tokenizers_end_of_text(fresh_base: MakeBase) -> None:
    """Answers are trained to end with the tokenizer's token, so that token ends an answer.

    Not every checkpoint's config names one.
    """
    base = fresh_base()
    ending_model(base, after=77)
    base.model.config.eos_token_id = base.model.generation_config.eos_token_id = None
    assert generate(base, base.model, [Encoded([77], [])], 5, 1) == [""]


def test_no_more_than_asked(base: Base) -> None:
    for count in (1, 4):
        ids = by_hand(base.model, QUESTIONS[0].prompt, count)
        wanted = base.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert generate(base, base.model, QUESTIONS[:1], count, 1) == [wanted]
    assert generate(base, base.model, [], 4, 8) == []


def test_a_checkpoints_wish_to_sample_is_not_heard(fresh_base: MakeBase) -> None:
    base = fresh_base()
    wanted = generate(base, base.model, QUESTIONS, 9, 4)
    wishes = {
        "do_sample": True,
        "temperature": 5.0,
        "top_k": 3,
        "top_p": 0.5,
        "repetition_penalty": 3.0,
        "num_beams": 2,
    }
    for name, value in wishes.items():
        setattr(base.model.generation_config, name, value)
    assert generate(base, base.model, QUESTIONS, 9, 4) == wanted
    # With the wishes heard the answer would be another one.
    heard = base.model.generate(
        input_ids=torch.tensor([QUESTIONS[1].prompt]),
        attention_mask=torch.ones(1, 21, dtype=torch.long),
        max_new_tokens=9,
        do_sample=False,
    )
    assert base.tokenizer.decode(heard[0, 21:], skip_special_tokens=True).strip() != wanted[1]


def test_answers_given_along_are_not_shown(base: Base) -> None:
    """A sample that carries its answer is asked by its prompt alone."""
    known = [replace(item, answer=[9, 9, 2]) for item in QUESTIONS]
    assert generate(base, base.model, known, 5, 4) == generate(base, base.model, QUESTIONS, 5, 4)

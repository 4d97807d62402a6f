"""Answers and likelihoods for many users, against stock PEFT and transformers one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from tasks.lora import forward, packing
from tasks.lora.adapters import LoraBatch
from tasks.lora.answer import answer_users, evidence, log_likelihoods
from tasks.lora.base import Base
from tasks.lora.batches import Encoded, encode
from tasks.lora.grouped import Layers, grouped
from tests.unit.lora.helpers import MakeBase, linear_shapes, random_lora, sample, stacked
from tests.unit.lora.peft_reference import answer_ids, attached, by_hand, likelihood

# Questions per user: two users share a shape, the others have their own.
COUNTS = (1, 3, 2, 3, 2)
QUESTIONS = [
    [Encoded(sample(50 * u + i, 4 + (5 * i + 3 * u) % 17, 1).prompt, []) for i in range(count)]
    for u, count in enumerate(COUNTS)
]
SAMPLES = [
    [sample(90 * u + i, 3 + (7 * i + 2 * u) % 20, 1 + (i + u) % 5) for i in range(count)]
    for u, count in enumerate(COUNTS)
]


class Users:
    """A merged-like LoRA (rank 6) and an own one (rank 2) for each user."""

    def __init__(self, base: Base) -> None:
        self.base = base
        # PEFT goes around a model of its own: `base` has grouped layers during a test.
        self.plain = copy.deepcopy(base.model)
        self.shapes = linear_shapes(base.model)
        self.unders = [random_lora(self.shapes, 6, 0.5, 10 + u, 0.15) for u in range(len(COUNTS))]
        self.owns = [random_lora(self.shapes, 2, 2.0, 30 + u, 0.15) for u in range(len(COUNTS))]

    def parts(self, users: Sequence[int]) -> tuple[LoraBatch, LoraBatch]:
        return (
            stacked([self.unders[u] for u in users]),
            stacked([self.owns[u] for u in users]),
        )

    def stock(self, user: int) -> torch.nn.Module:
        return attached(self.plain, under=self.unders[user], own=self.owns[user])

    def text(self, ids: list[int]) -> str:
        return self.base.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def users(fresh_base: MakeBase) -> Users:
    return Users(fresh_base())


@pytest.fixture
def layers(users: Users) -> Iterator[Layers]:
    with grouped(users.base.model, list(users.shapes)) as found:
        yield found


@pytest.fixture(scope="module")
def wanted(users: Users) -> list[list[str]]:
    """Stock PEFT's answers of 9 tokens, one question at a time."""
    return [
        [users.text(answer_ids(users.stock(u), item.prompt, 9)) for item in own]
        for u, own in enumerate(QUESTIONS)
    ]


@pytest.mark.parametrize("positions", [1, 120, None])
def test_answers_are_those_of_stock_peft(
    users: Users, wanted: list[list[str]], layers: Layers, positions: int | None
) -> None:
    assert len({text for own in wanted for text in own}) == sum(COUNTS)
    got = answer_users(users.base, layers, QUESTIONS, users.parts, 9, positions)
    assert got == wanted
    assert all(layer.joined is None for layer in layers.values())


def test_users_in_another_order(users: Users, wanted: list[list[str]], layers: Layers) -> None:
    order = [3, 0, 4, 1, 2]

    def parts(rows: Sequence[int]) -> tuple[LoraBatch, LoraBatch]:
        return users.parts([order[row] for row in rows])

    got = answer_users(users.base, layers, [QUESTIONS[u] for u in order], parts, 9)
    assert got == [wanted[u] for u in order]


def test_users_of_unequal_numbers_in_one_batch(
    users: Users, wanted: list[list[str]], layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows to fill up are dropped again, should a batch ever hold users of other sizes."""
    monkeypatch.setattr(packing, "micro_batches", lambda sizes, _limit: [[1, 0, 2], [4, 3]])
    assert answer_users(users.base, layers, QUESTIONS, users.parts, 9) == wanted


def test_the_base_model_without_parts(users: Users, layers: Layers) -> None:
    """Against argmax by hand, without a cache."""
    got = answer_users(users.base, layers, QUESTIONS, lambda _users: (None, None), 7)
    assert got == [
        [users.text(by_hand(users.plain, item.prompt, 7)) for item in own] for own in QUESTIONS
    ]


def test_no_more_than_asked(users: Users, layers: Layers) -> None:
    for count in (1, 4):
        got = answer_users(users.base, layers, QUESTIONS[:1], users.parts, count)
        ids = answer_ids(users.stock(0), QUESTIONS[0][0].prompt, count)
        assert got == [[users.text(ids)]]
    assert answer_users(users.base, layers, [], users.parts, 4) == []


def test_answers_given_along_are_not_shown(
    users: Users, wanted: list[list[str]], layers: Layers
) -> None:
    """A sample that carries its answer is asked by its prompt alone."""
    known = [[replace(item, answer=[9, 9, 2]) for item in own] for own in QUESTIONS]
    assert answer_users(users.base, layers, known, users.parts, 9) == wanted


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
    """One answer ends at once, others go on: each is what it is alone."""
    base = fresh_base()
    ending_model(base, after=77)
    samples = [Encoded([77], []), *QUESTIONS[1]]
    ids = [by_hand(base.model, item.prompt, 12) for item in samples]
    assert ids[0] == []
    assert max(len(tokens) for tokens in ids) > 0
    got = answer_users(base, {}, [samples], lambda _users: (None, None), 12)
    assert got == [
        [base.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in ids]
    ]


@pytest.mark.parametrize("positions", [1, 70, None])
def test_likelihoods_are_those_of_stock_peft(
    users: Users, layers: Layers, positions: int | None
) -> None:
    got = log_likelihoods(users.base, layers, SAMPLES, users.parts, positions)
    assert [len(own) for own in got] == list(COUNTS)
    assert {own.dtype for own in got} == {torch.float32}
    for user, own in enumerate(SAMPLES):
        stock = users.stock(user)
        for value, item in zip(got[user].tolist(), own, strict=True):
            assert value == pytest.approx(likelihood(stock, item), rel=1e-5, abs=1e-5)
    assert all(layer.joined is None for layer in layers.values())


@pytest.mark.parametrize("limit", [0, 512])
def test_likelihoods_in_either_layout(
    users: Users, layers: Layers, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    wanted = log_likelihoods(users.base, layers, SAMPLES, users.parts)
    monkeypatch.setattr(forward, "layout", lambda _samples: limit)
    got = log_likelihoods(users.base, layers, SAMPLES, users.parts)
    torch.testing.assert_close(torch.cat(got), torch.cat(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", [1, 40, None])
def test_evidence_is_every_user_under_every_anchor(
    users: Users, layers: Layers, positions: int | None
) -> None:
    """By brute force: each item of each user under each of three anchors, in stock PEFT."""
    anchors = users.unders[:3]
    got = evidence(users.base, layers, SAMPLES, stacked(anchors), positions)
    assert got.shape == (len(SAMPLES), 3)
    for k, anchor in enumerate(anchors):
        stock = attached(users.plain, own=anchor)
        for user, own in enumerate(SAMPLES):
            wanted = sum(likelihood(stock, item) for item in own)
            assert got[user, k].item() == pytest.approx(wanted, rel=1e-5)
    assert len({tuple(row) for row in got.T.tolist()}) == 3
    asked = torch.arange(len(SAMPLES) * 3).reshape(-1, 3) % 4 < 2
    asked[:, 1] = False
    some = evidence(users.base, layers, SAMPLES, stacked(anchors), positions, asked)
    torch.testing.assert_close(some, got.masked_fill(~asked, torch.nan), equal_nan=True)


def test_a_user_without_samples_has_no_likelihoods(fresh_base: MakeBase) -> None:
    base = fresh_base()
    sample = encode(base, "a film", "comedy")
    with grouped(base.model, []) as layers:
        got = log_likelihoods(base, layers, [[], [sample], []], lambda _users: (None, None))
    assert [len(own) for own in got] == [0, 1, 0]

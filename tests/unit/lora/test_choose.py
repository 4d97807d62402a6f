"""The best of given answers, and answering when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tasks.errors import InputError
from tasks.lora import answer, packing
from tasks.lora.adapters import LoraBatch
from tasks.lora.answer import Parts, answer_log_p, answer_users, greediest, log_likelihoods
from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.forward import label_losses, sum_by
from tasks.lora.grouped import Layers, assigned, grouped
from tasks.lora.packing import ONE_PER_ROW, pack
from tests.unit.lora.helpers import MakeBase, linear_shapes, random_lora, sample, stacked
from tests.unit.lora.peft_reference import attached, by_hand, likelihood

# Answers of 1 to 4 tokens before the end of text (2): the first is the start of the second, the
# second of the third.
LABELS = [[11, 2], [11, 12, 2], [11, 12, 13, 14, 2], [40, 2], [41, 42, 43, 2]]
# Questions per user.
COUNTS = (2, 1, 4)
QUESTIONS = [
    [sample(70 * u + i, 4 + (5 * i + 3 * u) % 17, 1).prompt for i in range(count)]
    for u, count in enumerate(COUNTS)
]


class Users:
    """One LoRA of rank 3 per user."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.shapes = linear_shapes(base.model)
        self.loras = [random_lora(self.shapes, 3, 1.0, 20 + u, 0.3) for u in range(len(COUNTS))]

    def parts(self, users: Sequence[int]) -> tuple[None, LoraBatch]:
        return None, stacked([self.loras[u] for u in users])


@pytest.fixture(scope="module")
def users(fresh_base: MakeBase) -> Users:
    return Users(fresh_base())


@pytest.fixture
def layers(users: Users) -> Iterator[Layers]:
    with grouped(users.base.model, list(users.shapes)) as found:
        yield found


def choose(
    base: Base,
    layers: Layers,
    samples: list[list[list[Encoded]]],
    parts: Parts,
    how: str = "likelihood",
    positions: int | None = None,
) -> list[list[int]]:
    """The numbers of the best answers, as the stage chooses them."""
    log_p = answer_log_p(base, layers, samples, parts, positions)
    if how == "constrained":
        return [[*map(greediest, *both)] for both in zip(samples, log_p, strict=True)]
    sums = [[[float(label.sum()) for label in one] for one in own] for own in log_p]
    return [[one.index(max(one)) for one in own] for own in sums]


def asked(labels: Sequence[list[int]] = LABELS) -> list[list[list[Encoded]]]:
    return [[[Encoded(p, label) for label in labels] for p in own] for own in QUESTIONS]


@pytest.fixture(scope="module")
def wanted(fresh_base: MakeBase, users: Users) -> list[list[list[float]]]:
    """log p of every label by stock PEFT, one at a time."""
    return [
        [
            [
                likelihood(attached(fresh_base().model, own=users.loras[u]), item)
                for item in question
            ]
            for question in own
        ]
        for u, own in enumerate(asked())
    ]


@pytest.mark.parametrize("positions", [1, 60, None])
def test_is_the_largest_likelihood_of_stock_peft(
    users: Users, layers: Layers, wanted: list[list[list[float]]], positions: int | None
) -> None:
    """So is every label's own likelihood; labels of any length win."""
    got = choose(users.base, layers, asked(), users.parts, positions=positions)
    assert got == [[one.index(max(one)) for one in own] for own in wanted]
    # The cases differ, or the index could come from anywhere.
    assert len({number for own in got for number in own}) > 1
    flat = [[item for question in own for item in question] for own in asked()]
    scores = log_likelihoods(users.base, layers, flat, users.parts, positions)
    for found, own in zip(scores, wanted, strict=True):
        assert found.tolist() == pytest.approx([x for one in own for x in one], rel=1e-5)


def test_the_prompt_is_run_once(
    users: Users, layers: Layers, wanted: list[list[list[float]]]
) -> None:
    """Choices on one prompt have the likelihoods of stock PEFT, which runs it for each of them."""
    shared = [[Encoded(p, [], choices=tuple(LABELS)) for p in own] for own in QUESTIONS]
    ends = sum(len(label) - 1 for label in LABELS)
    assert [one.length for one in shared[0]] == [len(p) + ends for p in QUESTIONS[0]]
    flat = [x for own in wanted for question in own for x in question]
    for limit in (ONE_PER_ROW, 60):
        packed = pack(shared, users.base.tokenizer.pad_token_id, limit)
        assert packed.tokens == sum(one.length for own in shared for one in own)
        with assigned(layers, *users.parts(range(len(COUNTS)))), torch.no_grad():
            losses = label_losses(users.base, packed)
        got = -sum_by(losses, packed.sample, len(flat))
        assert got.tolist() == pytest.approx(flat, rel=1e-5)


def test_ties_go_to_the_first(users: Users, layers: Layers) -> None:
    """The same answer twice has the same likelihood."""
    (best,), *_ = choose(users.base, layers, asked()[1:2], users.parts)
    twice = [LABELS[best], *LABELS, LABELS[best]]
    for how in ("likelihood", "constrained"):
        got = choose(users.base, layers, asked(twice)[1:2], users.parts, how)
        assert how == "constrained" or got == [[0]]
        assert got[0][0] < len(twice) - 1


@pytest.mark.parametrize("positions", [1, None])
def test_constrained_is_greedy_decoding_among_the_answers(
    fresh_base: MakeBase, users: Users, layers: Layers, positions: int | None
) -> None:
    """By stock PEFT, one token after the other, of those that still lead to an answer."""
    wanted = []
    for user, own in enumerate(QUESTIONS):
        model = attached(fresh_base().model, own=users.loras[user])
        for prompt in own:
            written: list[int] = []
            while written not in LABELS:
                leads = {one[len(written)] for one in LABELS if one[: len(written)] == written}
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([[*prompt, *written]])).logits[0, -1]
                written.append(max(leads, key=lambda token: float(logits[token])))
            wanted.append(LABELS.index(written))
    got = choose(users.base, layers, asked(), users.parts, "constrained", positions)
    assert [number for own in got for number in own] == wanted
    likeliest = choose(users.base, layers, asked(), users.parts, positions=positions)
    assert got != likeliest  # or the two ways could be one


def test_the_start_of_another_label_does_not_win_by_that(fresh_base: MakeBase) -> None:
    """Without its end the start of a label is never less likely than the whole label.

    In this model the end of text (2) follows the second token of a greedy continuation, not the
    first: its row of the head points along the state after two and not along the state after one.
    So the label of both tokens is the likelier, by the model's own logits; without the ends the
    shorter one would win.
    """
    base, prompt = fresh_base(), QUESTIONS[2][0]
    first, second = by_hand(base.model, prompt, 2)
    ids = torch.tensor([[*prompt, first, second]])
    with torch.no_grad():
        one, two = base.model.model(input_ids=ids).last_hidden_state[0, -2:]
        row = two - (two @ one) / (one @ one) * one
        base.model.lm_head.weight[2] = 5 * row / row.norm()
        log_p = base.model(input_ids=ids).logits[0, len(prompt) - 1 :].log_softmax(-1)
    short, long = log_p[0, first], log_p[0, first] + log_p[1, second]
    assert short > long
    assert long + log_p[2, 2] > short + log_p[1, 2] + 0.5
    samples = [Encoded(prompt, [first, 2]), Encoded(prompt, [first, second, 2])]
    assert choose(base, {}, [[samples]], lambda _users: (None, None)) == [[1]]
    without = [replace(item, answer=item.answer[:-1]) for item in samples]
    assert choose(base, {}, [[without]], lambda _users: (None, None)) == [[0]]


def test_questions_may_have_different_numbers_of_answers(users: Users, layers: Layers) -> None:
    """A user without questions among them."""
    alone = choose(users.base, layers, asked(), users.parts)
    some = asked()
    some[0][1] = some[0][1][3:]
    some[1] = []
    got = choose(users.base, layers, some, users.parts)
    assert (got[0][0], got[1], got[2]) == (alone[0][0], [], alone[2])
    two = log_likelihoods(users.base, layers, [some[0][1]], users.parts)[0]
    assert got[0][1] == int(two[1] > two[0])


Way = Callable[[Users, Layers, int | None], Any]


def answers(users: Users, layers: Layers, positions: int | None) -> Any:
    questions = [[Encoded(prompt, []) for prompt in own] for own in QUESTIONS]
    return answer_users(users.base, layers, questions, users.parts, 6, positions)


def likelihoods(users: Users, layers: Layers, positions: int | None) -> Any:
    flat = [[item for question in own for item in question] for own in asked()]
    return log_likelihoods(users.base, layers, flat, users.parts, positions)


def alike(left: Any, right: Any) -> bool:
    if isinstance(left[0], list):
        return bool(left == right)
    return all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(left, right, strict=True))


# The function that runs the model in each, and how many samples one call of it is given.
WAYS = [
    pytest.param(answers, "greedy", lambda given: len(given[1]), id="answers"),
    pytest.param(likelihoods, "_label_log_p", lambda given: sum(map(len, given[1])), id="labels"),
]


class Memory:
    """Runs out when more than `room` samples are in one batch; keeps the sizes of batches."""

    def __init__(
        self, patch: pytest.MonkeyPatch, name: str, count: Callable[..., int], room: int
    ) -> None:
        real = getattr(answer, name)
        self.tried: list[int] = []
        self.done: list[int] = []

        def limited(*given: Any) -> Any:
            size = count(given)
            self.tried.append(size)
            if size > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.done.append(size)
            return real(*given)

        patch.setattr(answer, name, limited)


def cleared(layers: Layers) -> bool:
    return all(layer.joined is None and layer.trained is None for layer in layers.values())


@pytest.mark.parametrize(("way", "name", "count"), WAYS)
def test_a_batch_that_does_not_fit_is_halved(
    users: Users,
    layers: Layers,
    monkeypatch: pytest.MonkeyPatch,
    way: Way,
    name: str,
    count: Callable[..., int],
) -> None:
    """Down to single samples of one user, whose piece is split: the same numbers come out.

    All users' pieces are put into one batch, so that there is something to halve.
    """
    usual = way(users, layers, None)
    everything = lambda sizes, _limit: [list(range(len(sizes)))]  # noqa: E731
    for room in (1000, 9, 4, 1):
        with monkeypatch.context() as patch:
            patch.setattr(packing, "micro_batches", everything)
            memory = Memory(patch, name, count, room)
            assert alike(way(users, layers, None), usual)
        assert cleared(layers)
        assert max(memory.done) <= room
        # Only what did not fit was tried again: whole, then in halves.
        assert (memory.tried == memory.done) == (max(memory.tried) <= room)
        if room == 1:
            assert memory.done == [1] * len(memory.done)
            samples = sum(COUNTS) * (1 if way is answers else len(LABELS))
            assert len(memory.done) == samples


@pytest.mark.parametrize(("way", "name", "count"), WAYS)
def test_a_single_sample_that_does_not_fit(
    users: Users,
    layers: Layers,
    monkeypatch: pytest.MonkeyPatch,
    way: Way,
    name: str,
    count: Callable[..., int],
) -> None:
    with monkeypatch.context() as patch:
        Memory(patch, name, count, 0)
        with pytest.raises(
            InputError, match=r"one sample of \d+ tokens does not fit.*base\.max_tokens"
        ):
            way(users, layers, None)
    assert cleared(layers)


@pytest.mark.parametrize(("way", "name", "count"), WAYS)
def test_layers_are_cleared_after_any_failure(
    users: Users,
    layers: Layers,
    monkeypatch: pytest.MonkeyPatch,
    way: Way,
    name: str,
    count: Callable[..., int],
) -> None:
    """The failure comes when the users' LoRAs are already in the layers."""

    def failing(*_given: Any, **_more: Any) -> Any:
        assert not cleared(layers)
        raise KeyError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(users.base.model, "forward", failing)
        with pytest.raises(KeyError, match="a bug"):
            way(users, layers, None)
    assert cleared(layers)


@pytest.mark.parametrize(("way", "name", "count"), WAYS)
def test_a_user_with_very_many_samples_is_worked_off_in_pieces(
    users: Users,
    layers: Layers,
    monkeypatch: pytest.MonkeyPatch,
    way: Way,
    name: str,
    count: Callable[..., int],
) -> None:
    """No batch is larger than the positions allow: 60 of them, the shortest sample has 5."""
    whole = way(users, layers, 10**6)
    with monkeypatch.context() as patch:
        memory = Memory(patch, name, count, 1000)
        assert alike(way(users, layers, 60), whole)
    assert max(memory.done) <= 60 // 5
    assert len(memory.done) > len(COUNTS)

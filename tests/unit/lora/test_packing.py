"""Samples as rows: by hand, by properties, and against one sample per row."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.forward import KNOWN_LAYERS, label_losses, sum_by
from tasks.lora.packing import (
    FILLED,
    MOST_PADDING,
    ONE_PER_ROW,
    ROW_TOKENS,
    footprint,
    layout,
    micro_batches,
    pack,
    rows_of,
)
from tests.unit.lora.helpers import model_of, sample, tiny_base
from tests.unit.lora.peft_reference import likelihood

sizes = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
)
limits = st.sampled_from([ONE_PER_ROW, 1, 8, 20, ROW_TOKENS])


def users_of(table: list[list[tuple[int, int]]]) -> list[list[Encoded]]:
    """Every token of the batch another number, from 1 on, so that each can be found again."""
    number, users = 1, []
    for own in table:
        samples = []
        for prompt, answer in own:
            ids = list(range(number, number + prompt + answer))
            number += prompt + answer
            samples.append(Encoded(ids[:prompt], ids[prompt:]))
        users.append(samples)
    return users


def test_by_hand() -> None:
    """User 0: samples of 3 and 2 tokens in one row; user 1: one of 2 tokens. 0 is padding."""
    users = [[Encoded([5, 6], [7]), Encoded([8], [9])], [Encoded([3], [4])]]
    packed = pack(users, 0, 8)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert packed.segments.tolist() == [[1, 1, 1, 2, 2], [3, 3, 0, 0, 0]]
    assert packed.source.tolist() == [1, 3, 5]
    assert packed.label.tolist() == [7, 9, 4]
    assert packed.sample.tolist() == [0, 1, 2]
    assert packed.user.tolist() == [0, 0, 1]
    assert (packed.users, packed.tokens) == (2, 7)
    first = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    second = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    mask = packed.mask(torch.float32)
    allowed = mask == 0
    assert allowed.shape == (2, 1, 5, 5)
    assert allowed[:, 0].int().tolist() == [first, second]
    assert (mask[~allowed] < -1e30).all()


@settings(deadline=None, max_examples=150)
@given(sizes, limits)
def test_everything_stands_once_and_labels_at_their_place(
    table: list[list[tuple[int, int]]], limit: int
) -> None:
    users = users_of(table)
    packed = pack(users, 0, limit)
    flat, segments = packed.input_ids.flatten(), packed.segments.flatten()
    every = [token for own in users for item in own for token in item.prompt + item.answer]
    assert sorted(flat[segments > 0].tolist()) == every
    assert not flat[segments == 0].any()
    assert packed.tokens == len(every)
    assert packed.one_per_row == (limit == ONE_PER_ROW)
    # Each answer token once, predicted from the place of the token before it: here number - 1.
    assert sorted(packed.label.tolist()) == sorted(
        token for own in users for item in own for token in item.answer
    )
    assert torch.equal(flat[packed.source], packed.label - 1)
    everything = list(chain(*users))
    for token, number, user in zip(
        packed.label.tolist(), packed.sample.tolist(), packed.user.tolist(), strict=True
    ):
        assert token in everything[number].answer
        assert everything[number] in users[user]
    # Rows are user-major, equally many for each; positions count from each sample's first token.
    rows = len(packed.input_ids) // len(users)
    owner = torch.arange(len(packed.input_ids)) // rows
    for row, user in enumerate(owner.tolist()):
        own = {token for item in users[user] for token in item.prompt + item.answer}
        assert set(packed.input_ids[row].tolist()) - {0} <= own
    assert torch.equal(packed.user, owner[packed.source // packed.input_ids.shape[1]])
    begin = {token: item.prompt[0] for item in everything for token in item.prompt + item.answer}
    for token, position in zip(flat.tolist(), packed.position_ids.flatten().tolist(), strict=True):
        assert position == (token - begin[token] if token else 0)
    if limit == ONE_PER_ROW:
        assert rows == max(len(own) for own in users)
    assert rows == max(footprint(own, limit)[0] for own in users)
    assert packed.input_ids.shape[1] == max(footprint(own, limit)[1] for own in users)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(1, 40), max_size=12), st.integers(0, 60))
def test_rows_of(lengths: list[int], limit: int) -> None:
    """Each sample once, in the fewest rows that could hold them; Graham's bound on the longest."""
    rows = rows_of(lengths, limit)
    assert sorted(chain(*rows)) == list(range(len(lengths)))
    assert all(rows)
    if limit == ONE_PER_ROW:
        assert rows == [[index] for index in range(len(lengths))]
        return
    fewest = max(1, math.ceil(sum(lengths) / limit))
    assert len(rows) == (min(fewest, len(lengths)) if lengths else 0)
    if lengths:
        longest = max(sum(lengths[index] for index in row) for row in rows)
        assert longest <= sum(lengths) / len(rows) + max(lengths)


def test_rows_by_hand() -> None:
    """24 tokens in rows of about 10 need three; 9, 8, then 3 beside 4: 9, 8, 7."""
    assert rows_of([3, 9, 4, 8], 10) == [[1], [3], [2, 0]]
    assert rows_of([3, 9, 4, 8], 24) == [[1, 3, 2, 0]]


def of_length(*lengths: int) -> list[Encoded]:
    return [sample(length, length - 1, 1) for length in lengths]


def test_layout_by_hand() -> None:
    """Rows of their own where at most 8 % of the places would be padding: 23 of 25, not 22."""
    assert layout([of_length(25, 21)]) == ONE_PER_ROW
    assert layout([of_length(25, 20)]) == ROW_TOKENS
    # Each user is padded to the user's own longest sample.
    assert layout([of_length(9, 9), of_length(90, 90)]) == ONE_PER_ROW


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 50)), max_size=15),
    st.floats(0.3, 1.0),
    st.integers(1, 20_000),
)
def test_micro_batches(shapes: list[tuple[int, int]], share: float, budget: int) -> None:
    """Each user once, equally many rows, within the budget, or alone; little padding of its own."""
    table = [(rows, length, max(1, int(share * rows * length))) for rows, length in shapes]
    batches = micro_batches(table, budget)
    assert sorted(chain(*batches)) == list(range(len(table)))
    for batch in batches:
        rows = {table[user][0] for user in batch}
        longest = max(table[user][1] for user in batch)
        assert len(rows) == 1
        positions = len(batch) * rows.pop() * longest
        assert len(batch) == 1 or positions <= budget
        held = sum(table[user][2] for user in batch)
        small = positions <= FILLED * budget
        assert len(batch) == 1 or small or held >= (1 - MOST_PADDING) * positions
    assert micro_batches(table, budget) == batches


def test_micro_batches_by_hand() -> None:
    assert micro_batches([(2, 10, 20)] * 5, 40) == [[4, 3], [2, 1], [0]]
    assert micro_batches([(2, 10, 20), (1, 10, 10), (2, 10, 20)], 1000) == [[2, 0], [1]]
    assert micro_batches([], 10) == []
    # 50 + 44 of 100 places are held; with 40 as well 134 of 150 would be, which is 10.7 % padding.
    three = [(1, 50, 50), (1, 44, 44), (1, 40, 40)]
    assert micro_batches(three, 200) == [[0, 1], [2]]
    # Where all of it is small padding is cheaper than another pass.
    assert micro_batches(three, 32 * 150) == [[0, 1, 2]]


@torch.no_grad()
def sums(base: Base, users: list[list[Encoded]], limit: int) -> torch.Tensor:
    packed = pack(users, 0, limit)
    count = sum(len(own) for own in users)
    return sum_by(label_losses(base, packed), packed.sample, count)


USERS = [
    [sample(10 * u + i, 2 + 5 * i, 1 + i % 4) for i in range(n)] for u, n in enumerate((5, 2, 1))
]


@pytest.mark.parametrize("limit", [ONE_PER_ROW, 30, ROW_TOKENS])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_losses_are_transformers_own(base: Base, limit: int, attention: str) -> None:
    """Each sample alone through the model, right-padded, with transformers' loss."""
    wanted = torch.tensor([-likelihood(base.model, item) for own in USERS for item in own])
    other = tiny_base()
    other.model.set_attn_implementation(attention)
    torch.testing.assert_close(sums(other, USERS, limit), wanted, rtol=1e-5, atol=1e-4)


def test_only_labels_go_through_the_head(base: Base) -> None:
    seen: list[tuple[int, ...]] = []
    hook = base.model.lm_head.register_forward_hook(lambda _m, x, _y: seen.append(x[0].shape))
    try:
        sums(base, USERS, ROW_TOKENS)
    finally:
        hook.remove()
    assert seen == [(1, sum(len(item.answer) for own in USERS for item in own), 32)]
    assert not base.model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("limit", [ONE_PER_ROW, ROW_TOKENS])
def test_after_the_last_attention_only_labels(base: Base, kind: Any, limit: int) -> None:
    """The last feed-forward sees M positions per user, M being the most labels of any; not all."""
    model = model_of(kind)
    assert type(model.model.layers[-1]).__name__ in KNOWN_LAYERS
    other = Base(model, base.tokenizer, base.device, 60)
    seen: list[tuple[int, ...]] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _m, x: seen.append(tuple(x[0].shape[:2])))
    got = sums(other, USERS, limit)
    most = max(sum(len(item.answer) for item in own) for own in USERS)
    assert seen[1] == (len(USERS), most)
    assert seen[0][0] * seen[0][1] > 3 * len(USERS) * most
    wanted = torch.tensor([-likelihood(model, item) for own in USERS for item in own])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)
    # What was put in is taken out again.
    assert "forward" not in vars(model.model.layers[-1])
    assert not model.model.layers[-1].self_attn.o_proj._forward_pre_hooks


@pytest.mark.parametrize("limit", [ONE_PER_ROW, ROW_TOKENS])
@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_losses_of_other_architectures(base: Base, kind: str, limit: int) -> None:
    """Learned positions (GPT-2) and another head's name (GPT-NeoX), one sample at a time."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 300, "initializer_range": 0.3}
    if kind == "gpt2":
        config: Any = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **sizes)
    else:
        config = GPTNeoXConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, **sizes,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    other = Base(model, base.tokenizer, base.device, 60)
    wanted = torch.tensor([-likelihood(model, item) for own in USERS for item in own])
    torch.testing.assert_close(sums(other, USERS, limit), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("budget", [3_000, 16_384])
@pytest.mark.parametrize("items", [4, 8])
@pytest.mark.parametrize("users", [8, 32, 64])
def test_padding_stays_under_a_tenth(users: int, items: int, budget: int) -> None:
    """On lengths as LaMP-2M's published users have them: 20 to 135 tokens, 60 on average (those
    films with their tags, by a byte-level BPE of 8,000 tokens), with a spread of 22."""
    generator = torch.Generator().manual_seed(users + items)
    drawn = 60 + 22 * torch.randn(20, users, items, generator=generator)
    computed = tokens = 0
    for step in drawn.clamp(20, 135).int().tolist():
        per_user = [of_length(*lengths) for lengths in step]
        limit = layout(per_user)
        sizes = [footprint(own, limit) for own in per_user]
        for batch in micro_batches(sizes, budget):
            packed = pack([per_user[user] for user in batch], 0, limit)
            computed += packed.input_ids.numel()
            tokens += packed.tokens
    assert tokens == int(drawn.clamp(20, 135).int().sum())
    assert 1 - tokens / computed < 0.1

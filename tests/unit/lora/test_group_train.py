"""Many users trained at once, against stock PEFT that trains each alone (`peft_reference`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM

from tasks.errors import InputError
from tasks.lora import forward, group_train
from tasks.lora.base import Base
from tasks.lora.forward import may_pack
from tasks.lora.group_train import default_positions, train_group
from tasks.lora.grouped import fresh, grouped, shapes_of
from tasks.lora.packing import ONE_PER_ROW, Packed
from tasks.lora.train import epochs
from tests.unit.lora.group_case import (
    BOUND,
    CASES,
    HISTORIES,
    LR,
    RANK,
    SCALE,
    SEEDS,
    Group,
    close,
    group,
    histories,
    precise_norms,
    small_device,
)
from tests.unit.lora.helpers import MakeBase, equal_tensors, sample, tiny_base, training
from tests.unit.lora.peft_reference import largest_difference


@pytest.mark.parametrize("case", CASES)
def test_together_is_each_alone_in_stock_peft(
    fresh_base: MakeBase, dtype: torch.dtype, case: str
) -> None:
    """Parameters, losses, numbers of steps and tokens of five users with 1 to 10 samples."""
    these = group(fresh_base(), dtype, case)
    loras, outcome = these.together()
    assert outcome.failed == []
    worst = 0.0
    for user, count in enumerate(HISTORIES):
        wanted, losses = these.alone(user)
        steps = list(epochs(count, these.options, SEEDS[user]))
        assert len(outcome.losses[user]) == len(steps) == len(losses)
        tolerance = 1e-4 if dtype == torch.float32 else 1e-11
        assert outcome.losses[user] == pytest.approx(losses, rel=tolerance)
        worst = max(worst, largest_difference(loras[user], wanted))
        assert largest_difference(loras[user], these.start(user)) > 0.2 * LR
        lengths = sum(len(item.prompt) + len(item.answer) for item in these.samples[user])
        assert outcome.tokens[user] == these.options.epochs * lengths
    assert worst <= BOUND[dtype]
    assert len({len(own) for own in outcome.losses}) > 1


def test_many_users_of_one_size(fresh_base: MakeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve users share each micro-batch, in float64; three of them against stock PEFT."""
    users = [[sample(60 * u + i, 9 + (i + u) % 3, 2 + i % 2) for i in range(4)] for u in range(12)]
    options = CASES["cosine, clipped, exact"][0]
    sizes = small_device(monkeypatch, 12)
    with precise_norms():
        base = fresh_base()
        base.model.to(torch.float64)
        these = Group(base, options, users, list(range(40, 52)))
        loras, _ = these.together()
        for user in (0, 5, 11):
            wanted = these.alone(user)[0]
            assert largest_difference(loras[user], wanted) <= BOUND[torch.float64]
    assert max(sizes) == 12


Stepped = tuple[list[int], dict[int, float]]


class GlobalClip(group_train._AdamW):
    """Faulty: one norm over all users, as `clip_grad_norm_` on the whole matrix would."""

    def step(self, rates: dict[int, float], losses: Tensor) -> Stepped:
        active = list(rates)
        total = self.grad[active].norm()
        self.grad[active] *= (self.options.max_grad_norm / (total + 1e-6)).clamp(max=1.0)
        return super().step(rates, losses)


class SharedSteps(group_train._AdamW):
    """Faulty: users that have done their steps go on with what gradient they had."""

    def step(self, rates: dict[int, float], losses: Tensor) -> Stepped:
        everyone = range(len(self.flat))
        rates = dict.fromkeys(everyone, self.options.learning_rate) | rates
        return super().step(rates, losses)


@pytest.mark.parametrize("faulty", [GlobalClip, SharedSteps])
def test_the_comparison_sees_a_fault(
    fresh_base: MakeBase, monkeypatch: pytest.MonkeyPatch, faulty: type
) -> None:
    """What the test above would say if the clip, or the number of steps, were the group's."""
    these = group(fresh_base())
    right, _ = these.together()
    monkeypatch.setattr(group_train, "_AdamW", faulty)
    wrong, _ = these.together()
    for user in (0, 1):
        wanted, _ = these.alone(user)
        assert largest_difference(right[user], wanted) <= BOUND[torch.float32]
    assert largest_difference(wrong[user], wanted) > 10 * BOUND[torch.float32]


def test_company_and_order_change_nothing(fresh_base: MakeBase, dtype: torch.dtype) -> None:
    these = group(fresh_base(), dtype)
    wanted, outcome = these.together()
    for users in ([4, 2, 0, 3, 1], [2, 1], [0], [3], [1, 3, 4]):
        got, other = these.together(users)
        close(got, wanted, BOUND[dtype])
        for row, user in enumerate(users):
            assert other.losses[row] == pytest.approx(outcome.losses[user], rel=1e-4)
            assert other.tokens[row] == outcome.tokens[user]


@pytest.mark.parametrize("positions", [1, 60, 200, 100_000])
def test_the_positions_change_nothing(
    fresh_base: MakeBase, dtype: torch.dtype, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one position every sample is a micro-batch; with many, users of like shape share one."""
    batches: list[int] = []
    real = group_train.label_losses

    def counted(base: Base, packed: Packed) -> torch.Tensor:
        batches.append(packed.users)
        return real(base, packed)

    these = group(fresh_base(), dtype)
    wanted, _ = these.together(positions=2000)
    monkeypatch.setattr(group_train, "label_losses", counted)
    got, outcome = these.together(positions=positions)
    close(got, wanted, BOUND[dtype])
    assert sum(len(own) for own in outcome.losses) == 16
    # Two epochs of 23 samples, each alone; a user's step in one piece where that fits, or halved.
    pieces = {1: 2 * sum(HISTORIES), 60: 24, 200: 16, 100_000: 16}[positions]
    assert sum(batches) == pieces
    assert (max(batches) == 1) == (positions == 1)


@pytest.mark.parametrize("limit", [ONE_PER_ROW, 24, 512])
def test_the_layout_changes_nothing(
    fresh_base: MakeBase, dtype: torch.dtype, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample per row, packed rows of at most 24 tokens (or one sample), and of 512."""
    these = group(fresh_base(), dtype)
    seen: list[bool] = []
    real = group_train.pack

    def pack(*arguments: Any) -> Packed:
        packed = real(*arguments)
        seen.append(packed.one_per_row)
        return packed

    monkeypatch.setattr(forward, "layout", lambda _samples: limit)
    monkeypatch.setattr(group_train, "pack", pack)
    got, _ = these.together()
    assert set(seen) == {limit == ONE_PER_ROW}
    for user in (0, 2):
        assert largest_difference(got[user], these.alone(user)[0]) <= BOUND[dtype]


def test_packed_with_eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention adds the mask to the scores; the reference is SDPA."""
    wanted, _ = group(tiny_base()).together()
    base = tiny_base()
    base.model.set_attn_implementation("eager")
    monkeypatch.setattr(forward, "layout", lambda _samples: 512)
    got, _ = group(base).together()
    close(got, wanted, BOUND[torch.float32])


def test_training_again_gives_the_same_bits(fresh_base: MakeBase) -> None:
    """Also after other users and another global seed; the global seed is left alone."""
    these = group(fresh_base())
    before = {name: tensor.clone() for name, tensor in these.base.model.state_dict().items()}
    first, run = these.together()
    these.together([2, 3])
    torch.manual_seed(12345)
    state = torch.random.get_rng_state()
    again, second = these.together()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(equal_tensors(first[user], again[user]) for user in first)
    assert run.losses == second.losses
    after = these.base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not these.base.model.training


def test_it_learns_by_heart(fresh_base: MakeBase) -> None:
    options = training(learning_rate=1e-2, epochs=15, batch_size=4, schedule="constant")
    _, outcome = Group(fresh_base(), options, histories()[:2], list(SEEDS[:2])).together()
    for losses in outcome.losses:
        assert losses[-1] < 0.3 * losses[0]


def test_initial_weights_can_be_given(fresh_base: MakeBase) -> None:
    """Two epochs' weights from fresh ones are those from the same weights given; kept as given."""
    these = group(fresh_base())
    shapes = shapes_of(these.base.model, "all-linear", RANK)
    given_weights = fresh(shapes, SEEDS)
    kept = given_weights.clone()
    wanted, _ = these.together()
    parts = these.parts(range(len(HISTORIES)))
    with grouped(these.base.model, list(shapes.sizes)) as layers:
        outcome = train_group(
            these.base, layers, shapes, these.samples, these.options, [*SEEDS],
            scale=SCALE, frozen=parts, initial=given_weights,
        )  # fmt: skip
    assert torch.equal(given_weights, kept)
    for user, lora in wanted.items():
        for name, (a, _) in shapes.split(outcome.flat).items():
            assert torch.equal(a[user], lora.layers[name][0])


def test_progress_counts_the_longest_history(fresh_base: MakeBase) -> None:
    calls: list[tuple[int, int]] = []
    group(fresh_base()).together(progress=lambda done, total: calls.append((done, total)))
    assert calls == [(number, 6) for number in range(1, 7)]


def test_default_positions(base: Base) -> None:
    """From the model alone; a wider model gets fewer, and never under 512."""
    assert default_positions(base) == default_positions(base)
    narrow = 64
    found = []
    for wide in (narrow, 1024, 4096, 8192, 16384):
        model = type("Model", (), {})()
        model.config = LlamaConfig(hidden_size=narrow, intermediate_size=wide)
        found.append(default_positions(Base(model, None, torch.device("cpu"), 8)))
    assert found == sorted(found, reverse=True)
    assert len(set(found)) >= 4
    assert min(found) >= 512


def test_gradient_checkpointing_recomputes_and_changes_nothing() -> None:
    """`base.gradient_checkpointing`: each block runs twice per step, and the numbers stay."""
    calls, results = [], []
    for checkpointing in (False, True):
        base = tiny_base()
        if checkpointing:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})
        runs: list[int] = []
        # Before the layer: recomputing stops as soon as the last tensor that is needed is there.
        base.model.model.layers[1].mlp.register_forward_pre_hook(lambda *_a, r=runs: r.append(1))
        loras, _ = group(base).together([2])
        calls.append(len(runs))
        results.append(loras)
    close(results[1], results[0], BOUND[torch.float32])
    assert calls[1] == 2 * calls[0]


def test_a_lora_on_the_output_embedding_is_refused(fresh_base: MakeBase) -> None:
    """PEFT takes `[lm_head, q_proj]`; here the head sees picked positions, not users' rows."""
    with pytest.raises(InputError, match="lm_head is the output embedding"):
        shapes_of(fresh_base().model, ["lm_head", "q_proj"], RANK)


def test_models_with_windows_get_one_sample_per_row() -> None:
    """Their layers' own masks know nothing of several samples in a row."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40}
    windowed = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=8))
    plain = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=None))
    assert not may_pack(windowed)
    assert may_pack(plain)

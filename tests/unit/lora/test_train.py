"""Training a whole model. The reference is a plain loop with transformers' own loss."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from tasks.lora.base import Base
from tasks.lora.batches import Encoded, answer_logits, collate
from tasks.lora.train import Trained, Training, epochs, fit
from tests.unit.lora.helpers import MakeBase, sample, tiny_model, training
from tests.unit.lora.peft_reference import loss_of, padded

SEED = 3
SAMPLES = [sample(seed, prompt, answer) for seed, (prompt, answer) in enumerate(
    [(7, 2), (12, 4), (3, 1), (20, 3), (9, 6), (5, 2), (15, 1), (8, 3), (11, 2), (6, 5)]
)]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        training(learning_rate=1e-3, epochs=1, max_grad_norm=1e9),
        training(learning_rate=1e-3, max_grad_norm=0.5, weight_decay=0.1, schedule="linear"),
        training(learning_rate=1e-4, batch_size=2, accumulation=2),
        training(learning_rate=1e-4, batch_size=3, warmup_share=0.0, schedule="constant"),
    ],
    ids=["one by one", "clipped, decayed, linear", "accumulated", "batches of 3, constant"],
)
def test_fit_is_the_plain_loop(fresh_base: MakeBase, options: Training) -> None:
    """Batches in the order of `epochs`; everything else is the reference's own.

    Adam turns rounding errors of tiny gradients into steps of up to the learning rate, and padding
    on the other side rounds differently: batches larger than one have a smaller rate.
    """
    base, other = fresh_base(), fresh_base()
    start = {name: p.clone() for name, p in base.model.named_parameters()}
    for model in (base.model, other.model):
        model.requires_grad_(True)
    steps = list(epochs(len(SAMPLES), options, SEED))
    trained = fit(base, list(base.model.parameters()), SAMPLES, steps, options)
    optimizer = torch.optim.AdamW(
        other.model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    schedule = get_scheduler(
        options.schedule,
        optimizer,
        num_warmup_steps=math.ceil(options.warmup_share * len(steps)),
        num_training_steps=len(steps),
    )
    losses = []
    for micro_batches in steps:
        tokens = sum(len(SAMPLES[index].answer) for index in chain(*micro_batches))
        losses.append(0.0)
        for batch in micro_batches:
            loss = loss_of(other.model, [SAMPLES[index] for index in batch], tokens)
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(other.model.parameters(), options.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert trained.losses == pytest.approx(losses, rel=1e-4)
    wanted = dict(other.model.named_parameters())
    moved = 0.0
    for name, got in base.model.named_parameters():
        assert (got - wanted[name]).abs().max() <= 0.05 * options.learning_rate
        moved = max(moved, float((got - start[name]).abs().max().detach()))
    assert moved > options.learning_rate


def test_hf_loss_of_one_sample_is_the_mean_of_its_answer(fresh_base: MakeBase) -> None:
    """`model(labels=...)` alone, without its `num_items_in_batch`: batch 1, accumulation 1."""
    base = fresh_base()
    item = SAMPLES[4]
    wanted = base.model(**padded([item])).loss.item()
    parameter = base.model.get_parameter("model.norm.weight").requires_grad_()
    trained = fit(base, [parameter], [item], [[[0]]], training(epochs=1))
    assert trained.losses == pytest.approx([wanted], rel=1e-5)
    assert trained.tokens == len(item.prompt) + len(item.answer)


def test_left_padding_changes_no_loss(base: Base) -> None:
    """Samples of 4 to 23 tokens in one batch against each alone, and against right padding."""

    def losses(samples: Sequence[Encoded]) -> torch.Tensor:
        batch = collate(base, samples)
        with torch.no_grad():
            logits = answer_logits(base.model, batch)
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), reduction="none"
        ).view(batch.labels.shape)

    together = losses(SAMPLES).sum(1)
    alone = torch.stack([losses([item]).sum() for item in SAMPLES])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        right = base.model(**padded(SAMPLES), num_items_in_batch=1).loss
    assert together.sum().item() == pytest.approx(right.item(), rel=1e-5)


def test_collate_by_hand(base: Base) -> None:
    batch = collate(base, [Encoded([5, 6, 7], [8, 2]), Encoded([9], [2])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 2], [0, 0, 0, 9, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
    assert batch.labels.tolist() == [[8, 2], [-100, 2]]
    assert batch.keep == 3


def test_only_label_positions_go_through_the_head(base: Base) -> None:
    """Of 23 positions three labels need the head; the values are those of the full logits."""
    widths: list[int] = []
    hook = base.model.lm_head.register_forward_hook(lambda _m, x, _y: widths.append(x[0].shape[1]))
    try:
        with torch.no_grad():
            got = answer_logits(base.model, collate(base, [SAMPLES[3]]))
            full = base.model(**padded([SAMPLES[3]])).logits
    finally:
        hook.remove()
    assert widths == [4, 23]
    torch.testing.assert_close(got, full[:, 19:22], rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(
    count=st.integers(1, 40),
    size=st.integers(1, 7),
    accumulation=st.integers(1, 5),
    rounds=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_epochs(count: int, size: int, accumulation: int, rounds: int, seed: int) -> None:
    options = training(epochs=rounds, batch_size=size, accumulation=accumulation)
    steps = list(epochs(count, options, seed))
    assert steps == list(epochs(count, options, seed))
    per_epoch = math.ceil(math.ceil(count / size) / accumulation)
    assert len(steps) == rounds * per_epoch
    for start in range(0, len(steps), per_epoch):
        micro = list(chain(*steps[start : start + per_epoch]))
        assert sorted(chain(*micro)) == list(range(count))
        assert [len(batch) for batch in micro[:-1]] == [size] * (len(micro) - 1)
    full = [step for number, step in enumerate(steps, 1) if number % per_epoch]
    assert all(len(step) == accumulation for step in full)


def test_epochs_differ_by_seed_and_by_epoch() -> None:
    """Of 30! orders two are the same by chance once in 10^32 runs."""
    two = [list(chain(*step)) for step in epochs(30, training(epochs=2, batch_size=30), 3)]
    other = [list(chain(*step)) for step in epochs(30, training(epochs=2, batch_size=30), 4)]
    assert two[0] != two[1]
    assert two[0] != other[0]


def test_training_again_gives_the_same_bits(fresh_base: MakeBase) -> None:
    """No global seed counts, and none is used up."""
    runs, weights = [], []
    for seed in (5, 99):
        base = fresh_base()
        base.model.requires_grad_(True)
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        steps = list(epochs(len(SAMPLES), training(), SEED))
        runs.append(fit(base, list(base.model.parameters()), SAMPLES, steps, training()))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not base.model.training
        weights.append(base.model.state_dict())
    assert runs[0] == runs[1]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def fitted(base: Base, samples: Sequence[Encoded], options: Training) -> Trained:
    base.model.requires_grad_(True)
    steps = list(epochs(len(samples), options, SEED))
    return fit(base, list(base.model.parameters()), samples, steps, options)


def test_a_loss_that_is_not_finite(fresh_base: MakeBase) -> None:
    base = fresh_base()
    with torch.no_grad():
        base.model.get_parameter("lm_head.weight")[7] = float("nan")
    failed = fitted(base, SAMPLES, training()).failed
    assert re.fullmatch(r"the loss is nan, its gradient .* at step 1", failed)


def test_a_diverging_run_is_stopped(fresh_base: MakeBase) -> None:
    """A learning rate of 1e30 overflows float32 logits after its first step."""
    options = training(learning_rate=1e30, warmup_share=0.0, schedule="constant")
    trained = fitted(fresh_base(), SAMPLES, options)
    assert re.search(r"at step [1-9]$", trained.failed)
    assert len(trained.losses) < len(SAMPLES)


def test_counts(fresh_base: MakeBase) -> None:
    """Two epochs: 2 x all tokens, prompt and answer; truncated samples are counted once."""
    base = fresh_base()
    samples = [*SAMPLES[:3], Encoded([4, 5], [2], truncated=True)]
    parameter = base.model.get_parameter("model.norm.weight").requires_grad_()
    calls: list[tuple[int, int]] = []
    options = training(epochs=2, batch_size=3)
    steps = list(epochs(len(samples), options, SEED))
    trained = fit(
        base, [parameter], samples, steps, options, lambda done, total: calls.append((done, total))
    )
    assert trained.tokens == 2 * (9 + 16 + 4 + 3)
    assert trained.truncated == 1
    assert len(trained.losses) == 4
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_reference_model_is_random_but_fixed() -> None:
    """What the tolerances above are relative to: another seed is another model."""
    one, same_again, other = tiny_model(300, 0), tiny_model(300, 0), tiny_model(300, 1)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.get_parameter(name), same_again.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))

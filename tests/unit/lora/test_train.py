"""Training. The reference is a plain loop: stock PEFT, right padding, transformers' own loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import get_scheduler

from tasks.lora import adapters
from tasks.lora.base import Base
from tasks.lora.batches import Encoded, answer_logits, collate
from tasks.lora.merge import merge
from tasks.lora.train import Recipe, epochs, fit, train_lora
from tests.unit.lora.helpers import (
    equal_tensors,
    linear_shapes,
    random_lora,
    same,
    sample,
    tiny_model,
    training,
)

MakeBase = Callable[[], Base]
SAMPLES = [sample(seed, prompt, answer) for seed, (prompt, answer) in enumerate(
    [(7, 2), (12, 4), (3, 1), (20, 3), (9, 6), (5, 2), (15, 1), (8, 3), (11, 2), (6, 5)]
)]  # fmt: skip


def padded(samples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Right-padded full rows with labels -100 off the answer, as transformers' examples do."""
    width = max(len(item.prompt) + len(item.answer) for item in samples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for item in samples:
        used = len(item.prompt) + len(item.answer)
        gap = width - used
        rows["input_ids"].append(item.prompt + item.answer + [0] * gap)
        rows["attention_mask"].append([1] * used + [0] * gap)
        rows["labels"].append([-100] * len(item.prompt) + item.answer + [-100] * gap)
    return {name: torch.tensor(value) for name, value in rows.items()}


def reference(
    model: Any, start: adapters.Lora, steps: list[list[list[int]]], recipe: Recipe
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Parameters and losses of the plain loop, from the LoRA `start` (rank 4, alpha 8)."""
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    stock = get_peft_model(model, config)
    named = dict(stock.named_parameters())
    with torch.no_grad():
        for layer, pair in start.layers.items():
            for letter, tensor in zip("AB", pair, strict=True):
                named[f"base_model.model.{layer}.lora_{letter}.default.weight"].copy_(tensor)
    trained = {name: p for name, p in named.items() if "lora_" in name}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = get_scheduler(
        recipe.schedule,
        optimizer,
        num_warmup_steps=math.ceil(recipe.warmup_share * len(steps)),
        num_training_steps=len(steps),
    )
    losses = []
    stock.train()
    for micro_batches in steps:
        tokens = sum(len(SAMPLES[index].answer) for index in chain(*micro_batches))
        loss = sum(
            stock(
                **padded([SAMPLES[index] for index in batch]), num_items_in_batch=tokens
            ).loss
            for batch in micro_batches
        )  # fmt: skip
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(trained.values(), recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): p.detach()
        for name, p in trained.items()
    }, losses


@pytest.mark.parametrize(
    "recipe",
    [
        training(epochs=1, max_grad_norm=1e9),
        training(epochs=2, max_grad_norm=0.5, weight_decay=0.1, schedule="linear"),
        training(epochs=2, learning_rate=1e-3, batch_size=2, accumulation=2),
        training(epochs=2, learning_rate=1e-3, batch_size=3, warmup_share=0.0, schedule="constant"),
    ],
    ids=["one by one", "clipped, decayed, linear", "accumulated", "batches of 3, constant"],
)
def test_train_lora_is_the_plain_loop(fresh_base: MakeBase, recipe: Recipe) -> None:
    """Batches in the order of `epochs`; everything else is the reference's own.

    Adam turns rounding errors of tiny gradients into steps of up to the learning rate, and padding
    on the other side rounds differently: batches larger than one have a smaller rate.
    """
    base = fresh_base()
    model = adapters.attach(base.model, "meta", 4, 2.0, "all-linear")
    start = adapters.fresh(model, "meta", recipe.seed)
    steps = list(epochs(len(SAMPLES), recipe))
    wanted, losses = reference(fresh_base().model, start, steps, recipe)
    lora, trained = train_lora(base, model, "meta", SAMPLES, recipe)
    assert trained.losses == pytest.approx(losses, rel=1e-4)
    moved = 0.0
    for layer, (a, b) in lora.layers.items():
        for letter, got, before in zip("AB", (a, b), start.layers[layer], strict=True):
            assert (got - wanted[f"{layer}.lora_{letter}"]).abs().max() <= 1e-5
            moved = max(moved, float((got - before).abs().max()))
    assert len(wanted) == 2 * len(lora.layers)
    assert moved > 10 * recipe.learning_rate / 4


def test_hf_loss_of_one_sample_is_the_mean_of_its_answer(fresh_base: MakeBase) -> None:
    """`model(labels=...)` alone, without its `num_items_in_batch`: batch 1, accumulation 1."""
    base = fresh_base()
    item = SAMPLES[4]
    wanted = base.model(**padded([item])).loss.item()
    parameter = base.model.get_parameter("model.norm.weight").requires_grad_()
    trained = fit(base, base.model, [parameter], [item], training(epochs=1))
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
    recipe = training(epochs=rounds, batch_size=size, accumulation=accumulation, seed=seed)
    steps = list(epochs(count, recipe))
    assert steps == list(epochs(count, recipe))
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
    two = [list(chain(*step)) for step in epochs(30, training(epochs=2, batch_size=30))]
    other = [list(chain(*step)) for step in epochs(30, training(epochs=2, batch_size=30, seed=4))]
    assert two[0] != two[1]
    assert two[0] != other[0]


def test_published_schedule_of_ten_items_moves_once(fresh_base: MakeBase) -> None:
    """METHOD, stage 3: 10 items in batches of 2 x 4 are two steps, and the first has rate 0.

    transformers: warm-up is ceil(0.1 * 2) = 1 step, from 0; then the cosine from its top.
    """
    recipe = training(
        learning_rate=5e-5, epochs=1, batch_size=2, accumulation=4, warmup_share=0.1
    )  # fmt: skip
    assert [len(step) for step in epochs(10, recipe)] == [4, 1]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=5e-5)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=2)
    rates = [optimizer.param_groups[0]["lr"]]
    optimizer.step()
    schedule.step()
    rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.0, 5e-5]

    base = fresh_base()
    model = adapters.attach(base.model, "stacked", 4, 2.0, "all-linear")
    seen: list[adapters.Lora] = []
    steps: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        steps.append((done, total))
        seen.append(adapters.read(model, "stacked"))

    train_lora(base, model, "stacked", SAMPLES, recipe, progress)
    assert steps == [(1, 2), (2, 2)]
    start = adapters.fresh(model, "stacked", recipe.seed)
    assert equal_tensors(seen[0], start)
    largest = max(float(b.abs().max()) for _, b in seen[1].layers.values())
    # Adam's first real step of a clipped gradient is near the rate: it cannot be ten times it.
    assert 0.1 * 5e-5 < largest < 2 * 5e-5


def test_only_the_named_lora_changes(fresh_base: MakeBase) -> None:
    """Base and merged LoRA stay as they were to the last bit, and the merged one counts."""
    base = fresh_base()
    shapes = linear_shapes(base.model)
    merged = merge([random_lora(shapes, 2, 0.5, seed) for seed in (1, 2)], [0.6, 0.4], "exact")
    model = adapters.attach(base.model, "merged", 4, 0.5, "all-linear")
    model = adapters.attach(model, "stacked", 3, 2.0, "all-linear")
    adapters.fill(model, "merged", merged)
    model.base_model.set_adapter(["merged", "stacked"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora, trained = train_lora(base, model, "stacked", SAMPLES, training())
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {name for name in before if ".stacked." in name}
    assert not model.training
    assert same(adapters.read(model, "merged"), merged)

    # The same on a base that holds the merged update in its weights: W + s B A (Hu et al. 2021).
    summed = fresh_base()
    with torch.no_grad():
        for name, (a, b) in merged.layers.items():
            summed.model.get_submodule(name).weight += merged.scale * b @ a
    alone = adapters.attach(summed.model, "stacked", 3, 2.0, "all-linear")
    wanted, reference_run = train_lora(summed, alone, "stacked", SAMPLES, training())
    assert trained.losses == pytest.approx(reference_run.losses, rel=1e-3)
    for name, (a, b) in lora.layers.items():
        torch.testing.assert_close(a, wanted.layers[name][0], rtol=0, atol=1e-3)
        torch.testing.assert_close(b, wanted.layers[name][1], rtol=0, atol=1e-3)


def test_training_again_gives_the_same_bits(fresh_base: MakeBase) -> None:
    """Also on a model that trained another user before: nothing is left over, no global seed."""
    base = fresh_base()
    model = adapters.attach(base.model, "meta", 4, 2.0, "all-linear")
    first, run = train_lora(base, model, "meta", SAMPLES, training())
    train_lora(base, model, "meta", SAMPLES[:3], training(seed=99))
    torch.manual_seed(12345)
    again, second = train_lora(base, model, "meta", SAMPLES, training())
    assert same(first, again)
    assert run == second
    assert run.losses[-1] < run.losses[0]


def test_gradient_checkpointing_changes_nothing(fresh_base: MakeBase) -> None:
    """It recomputes the same activations, so losses agree; frozen embeddings must not cut it."""
    results = []
    for checkpointing in (False, True):
        base = fresh_base()
        if checkpointing:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})
        model = adapters.attach(base.model, "meta", 4, 2.0, "all-linear")
        results.append(train_lora(base, model, "meta", SAMPLES, training(epochs=1)))
    (plain, run), (recomputed, other) = results
    assert other.losses == pytest.approx(run.losses, rel=1e-5)
    for name, pair in plain.layers.items():
        torch.testing.assert_close(pair, recomputed.layers[name], rtol=0, atol=1e-5)


def test_nothing_to_train_on_and_nan(fresh_base: MakeBase) -> None:
    base = fresh_base()
    model = adapters.attach(base.model, "meta", 2, 1.0, "all-linear")
    with pytest.raises(ValueError, match="at least one sample"):
        train_lora(base, model, "meta", [], training())
    with torch.no_grad():
        base.model.get_parameter("lm_head.weight")[7] = float("nan")
    with pytest.raises(FloatingPointError, match="loss is nan at step 0"):
        train_lora(base, model, "meta", SAMPLES, training())


def test_a_diverging_run_is_stopped(fresh_base: MakeBase) -> None:
    """A learning rate of 1e30 overflows float32 logits after its first step."""
    base = fresh_base()
    model = adapters.attach(base.model, "meta", 2, 1.0, "all-linear")
    with pytest.raises(FloatingPointError, match=r"at step [1-9]"):
        train_lora(
            base, model, "meta", SAMPLES,
            training(learning_rate=1e30, warmup_share=0.0, schedule="constant"),
        )  # fmt: skip


def test_counts(fresh_base: MakeBase) -> None:
    """Two epochs: 2 x all tokens, prompt and answer; truncated samples are counted once."""
    base = fresh_base()
    model = adapters.attach(base.model, "meta", 2, 1.0, ["q_proj"])
    samples = [*SAMPLES[:3], Encoded([4, 5], [2], truncated=True)]
    _, trained = train_lora(base, model, "meta", samples, training(epochs=2, batch_size=3))
    assert trained.tokens == 2 * (9 + 16 + 4 + 3)
    assert trained.truncated == 1
    assert len(trained.losses) == 4


def test_the_reference_model_is_random_but_fixed() -> None:
    """What the tolerances above are relative to: another seed is another model."""
    one, same_again, other = tiny_model(300, 0), tiny_model(300, 0), tiny_model(300, 1)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.get_parameter(name), same_again.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))

"""The slow engine: the grouped one's results, and models that the grouped one cannot wrap."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from tasks.errors import InputError
from tasks.lora import answer, peft_engine
from tasks.lora.adapters import Lora, LoraBatch, read_peft, write_peft
from tasks.lora.bank import stack
from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.grouped import grouped
from tasks.lora.merge import MergedUsers
from tests.unit.lora.group_case import BOUND, CASES, Group, close, group, histories
from tests.unit.lora.helpers import MakeBase, random_lora, same, sample, stacked, training
from tests.unit.lora.peft_reference import answer_ids, attached, likelihood
from tests.unit.lora.test_answer import QUESTIONS, SAMPLES, Users
from tests.unit.lora.test_architectures import WIDE, base_of
from tests.unit.lora.test_checkpoint import Killed, at, killer
from tests.unit.lora.test_choose import asked

EXPERTS = ["mixtral", "qwen3_moe"]
LFM2 = WIDE | {
    "full_attn_idxs": [1],
    "block_ff_dim": 48,
    "block_auto_adjust_ff_dim": False,
}


def log_likelihoods(
    base: Base, samples: Sequence[Sequence[Encoded]], parts: answer.Parts
) -> list[Tensor]:
    """As `answer.log_likelihoods`, user by user, one sample at a time."""
    found = []
    for user, own in enumerate(samples):
        with peft_engine.attached(base.model, [some.one(0) for some in parts([user]) if some]):
            found += answer.log_likelihoods(base, {}, [own], lambda _users: (None, None), 1)
    return found


@pytest.mark.parametrize("case", CASES)
def test_trains_as_the_grouped_engine(fresh_base: MakeBase, case: str) -> None:
    """Five users over merged LoRAs or none: weights, losses and counts; the model is as before."""
    these = group(fresh_base(), case=case)
    wanted, grouped_outcome = these.together()
    modules = dict(these.base.model.named_modules())
    state = torch.random.get_rng_state()
    got, outcome = these.together(engine=peft_engine)
    close(got, wanted, BOUND[torch.float32])
    for mine, theirs in zip(outcome.losses, grouped_outcome.losses, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert outcome.tokens == grouped_outcome.tokens
    assert outcome.computed >= sum(outcome.tokens)
    assert dict(these.base.model.named_modules()) == modules
    assert not these.base.model.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_user_that_fails_is_named(fresh_base: MakeBase) -> None:
    """NaN in user 1's merged LoRA: that user stays as it began, the others are as without it."""
    these = group(fresh_base())
    wanted, _ = these.together()
    healthy = these.parts(range(5))

    def frozen(users: Sequence[int]) -> LoraBatch:
        broken, made = math.nan if list(users) == [1] else 1.0, healthy(users)
        return LoraBatch({n: (a, b * broken) for n, (a, b) in made.layers.items()}, made.scale)

    got, outcome = these.together(engine=peft_engine, frozen=frozen)
    assert outcome.failed == [1]
    assert [len(losses) for losses in outcome.losses] == [2, 1, 6, 2, 2]
    wanted[1] = these.start(1)
    close(got, wanted, BOUND[torch.float32])


def test_killed_users_go_on(fresh_base: MakeBase, tmp_path: Path) -> None:
    """Killed in the third user (2 and 4 steps before): two are not trained again."""
    these = group(fresh_base())
    wanted, outcome = these.together(engine=peft_engine)
    path, done = tmp_path / "c.safetensors", list[int]()
    with pytest.raises(Killed):
        these.together(engine=peft_engine, progress=killer(8), checkpoint=at(path))
    got, again = these.together(
        engine=peft_engine, progress=lambda step, _: done.append(step), checkpoint=at(path)
    )
    assert done == list(range(7, 17))
    assert all(same(got[user], wanted[user]) for user in got)
    assert (again.losses, again.tokens) == (outcome.losses, outcome.tokens)
    assert again.computed == outcome.computed


def test_answers_as_the_grouped_engine(fresh_base: MakeBase) -> None:
    """Answers, likelihoods of given ones, and evidence, with a merged LoRA below the own one."""
    users = Users(fresh_base())
    base, layers = users.base, dict[str, Any]()
    questions, choices = QUESTIONS[:3], asked()
    anchors = stacked(users.unders[:2])
    wanted_of = torch.arange(len(SAMPLES) * 2).reshape(-1, 2) % 3 < 2
    with grouped(base.model, list(users.shapes)) as wrapped:
        answers = answer.answer_users(base, wrapped, questions, users.parts, 6)
        chosen = answer.answer_log_p(base, wrapped, choices, users.parts)
        scores = answer.log_likelihoods(base, wrapped, SAMPLES, users.parts)
        table = answer.evidence(base, wrapped, SAMPLES, anchors, asked=wanted_of)
    assert peft_engine.answer_users(base, layers, questions, users.parts, 6) == answers
    ours = peft_engine.answer_log_p(base, layers, choices, users.parts)
    torch.testing.assert_close(ours, chosen, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(log_likelihoods(base, SAMPLES, users.parts), scores, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    got = peft_engine.evidence(base, layers, SAMPLES, anchors, asked=wanted_of)
    torch.testing.assert_close(got, table, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_a_layer_that_peft_does_not_wrap_is_named(fresh_base: MakeBase) -> None:
    lora = random_lora(
        {"model.layers.0.self_attn.q_proj": (32, 32), "model.norm": (32, 32)}, 2, 1, 0
    )
    with (
        pytest.raises(ValueError, match=r"model\.norm|LlamaRMSNorm"),
        peft_engine.attached(fresh_base().model, [lora]),
    ):
        pass


def test_layers_with_a_state() -> None:
    """LFM2's convolutions carry a state from token to token: as stock PEFT does it, alone."""
    base = base_of("lfm2", LFM2)
    these = Group(base, CASES["constant, warm-up, bare base"][0], histories()[:2], [1, 2])
    wanted = {user: these.alone(user)[0] for user in range(2)}
    got, _ = these.together(engine=peft_engine)
    close(got, wanted, BOUND[torch.float32])
    parts = lambda users: (None, stacked([got[user] for user in users]))  # noqa: E731
    scores = log_likelihoods(base, these.samples, parts)
    answers = peft_engine.answer_users(base, {}, these.samples, parts, 6)
    for user, own in enumerate(these.samples):
        stock = attached(base.model, own=got[user])
        alone = [likelihood(stock, item) for item in own]
        assert scores[user].tolist() == pytest.approx(alone, rel=1e-4)
        ids = [answer_ids(stock, item.prompt, 6) for item in own]
        texts = base.tokenizer.batch_decode(ids, skip_special_tokens=True)
        assert answers[user] == [text.strip() for text in texts]


# --- experts as bare parameters -------------------------------------------------------------------


def added(base: Base, lora: Lora) -> None:
    """Add a LoRA on experts to the weights themselves (Hu et al. 2021, equation 3), one by one."""
    with torch.no_grad():
        for name, (a, b) in lora.layers.items():
            path, _, number = name.replace(".base_layer", "").partition("[")
            update = lora.scale * b @ a
            if number:
                matrices = base.model.get_parameter(path)
                place = matrices[int(number[:-1])] if matrices.ndim == 3 else matrices
                place += update
            else:
                base.model.get_submodule(path).weight += update


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=torch.tensor([[5, 80, 33, 290, 7, 112, 64, 3]])).logits


def expert_lora(name: str, seed: int, rank: int = 2, scale: float = 0.5) -> Lora:
    sizes = peft_engine.shapes_of(base_of(name).model, "all-linear", rank).sizes
    return random_lora({n: (out, fan) for n, (fan, out) in sizes.items()}, rank, scale, seed)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_layers_of_their_own(name: str) -> None:
    """Two layers: q, k, v and o; four experts of two matrices; a router [4, 32]."""
    model = base_of(name).model
    sizes = peft_engine.shapes_of(model, "all-linear", 2).sizes
    wide = {"mixtral": 48, "qwen3_moe": 24}[name]
    assert len(sizes) == 2 * (4 + 4 * 2 + 1)
    experts = "model.layers.1.mlp.experts"
    assert sizes[f"{experts}.base_layer.gate_up_proj[3]"] == (32, 2 * wide)
    assert sizes[f"{experts}.down_proj[0]"] == (wide, 32)
    assert sizes["model.layers.0.mlp.gate.weight[0]"] == (32, 4)
    some = peft_engine.shapes_of(model, ["q_proj"], 2, ["experts.down_proj"]).sizes
    assert len(some) == 2 * (1 + 4)
    assert f"{experts}.down_proj[3]" in some


@pytest.mark.parametrize("name", EXPERTS)
def test_logits_are_those_of_the_summed_weights(name: str, tmp_path: Path) -> None:
    """Of two LoRAs at once, and of one as a folder in stock PEFT, which is read as written."""
    base, summed = base_of(name), base_of(name)
    plain = logits(base.model)
    under, own = expert_lora(name, 1, rank=3), expert_lora(name, 2)
    write_peft(tmp_path, under, "base")
    added(summed, under)
    wanted = logits(summed.model)
    assert (wanted - plain).abs().max() > 0.1
    stock = PeftModel.from_pretrained(base_of(name).model, tmp_path)
    torch.testing.assert_close(logits(stock), wanted, rtol=1e-4, atol=1e-4)
    assert same(read_peft(tmp_path), under)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 5}))
    with pytest.raises(InputError, match="only plain LoRA is read"):
        read_peft(tmp_path)
    added(summed, own)
    with peft_engine.attached(base.model, [under, own]):
        torch.testing.assert_close(logits(base.model), logits(summed.model), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(base.model), plain)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("how", ["exact", "svd"])
def test_a_model_with_experts_trains_and_answers(name: str, how: str) -> None:
    """Over merged LoRAs of a bank: it learns by heart, and its own items become its answers."""
    base = base_of(name)
    bank = stack("ab", [expert_lora(name, seed, scale=0.25) for seed in (1, 2)])
    recipes = [(("a", "b"), (0.75, 0.25)), (("b", "a"), (0.5, 0.5))]
    merged = MergedUsers(bank, recipes, how, base.device)
    samples = [[sample(10 * user + i, 9, 3) for i in range(4)] for user in range(2)]
    shapes = peft_engine.shapes_of(base.model, "all-linear", 4)
    options = training(learning_rate=2e-2, epochs=30, batch_size=4, schedule="constant")
    outcome = peft_engine.train_group(
        base, {}, shapes, samples, options, [1, 2], scale=1.0, frozen=merged.parts
    )
    for losses in outcome.losses:
        assert losses[-1] < 0.3 * losses[0]
    experts = [n for n in shapes.sizes if "gate_up_proj" in n]
    assert any(shapes.split(outcome.flat)[n][1].abs().max() > 1e-3 for n in experts)

    def parts(users: Sequence[int]) -> tuple[LoraBatch, LoraBatch]:
        return merged.parts(users), LoraBatch(shapes.split(outcome.flat[list(users)]), 1.0)

    summed = base_of(name)
    for part in parts([0]):
        added(summed, part.one(0))
    bare = lambda _users: (None, None)  # noqa: E731
    got = log_likelihoods(base, samples[:1], parts)
    wanted = answer.log_likelihoods(summed, {}, samples[:1], bare, 1)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-3, atol=1e-3)
    questions = [[Encoded(item.prompt, []) for item in own] for own in samples[:1]]
    assert peft_engine.answer_users(base, {}, questions, parts, 4) == answer.answer_users(
        summed, {}, questions, bare, 4, 1
    )

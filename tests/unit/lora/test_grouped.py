"""Grouped layers: which they are (PEFT's choice), what they compute, and that they go again."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from tasks.errors import InputError
from tasks.lora.adapters import Lora, LoraBatch
from tasks.lora.base import Base
from tasks.lora.grouped import GroupedLinear, Shapes, assigned, fresh, grouped, shapes_of
from tasks.lora.targets import target_layers
from tests.unit.lora.helpers import HIDDEN, LAYERS, MakeBase, linear_shapes, random_lora, stacked
from tests.unit.lora.peft_reference import attached
from tests.unit.lora.test_architectures import ARCHITECTURES

IDS = torch.tensor([[5, 80, 33, 290, 7, 112, 64, 3], [9, 8, 7, 6, 5, 4, 3, 250]])
TARGETS = [
    "all-linear",
    ["q_proj", "down_proj"],
    ["self_attn.v_proj"],
    ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj"],
    ["proj", "q_proj"],
    r".*\.[qk]_proj",
    r"model\.layers\.1\..*_proj",
    r".*\.(gate_proj|v_proj)",
]


def pefts_choice(model: torch.nn.Module, targets: list[str] | str) -> list[str]:
    stock = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    return sorted(
        name.removeprefix("base_model.model.")
        for name, module in stock.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    )


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_targets_are_pefts(fresh_base: MakeBase, targets: list[str] | str) -> None:
    base = fresh_base()
    found = target_layers(base.model, targets)
    assert list(found) == sorted(found)
    for name, size in found.items():
        assert size == tuple(base.model.get_parameter(f"{name}.weight").shape[::-1])
    assert list(found) == pefts_choice(base.model, targets)


def neox() -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


def test_targets_of_another_architecture() -> None:
    model = neox()
    found = list(target_layers(model, "all-linear"))
    assert found == pefts_choice(model, "all-linear")
    assert len(found) == 2 * 4


def test_targets_of_gpt2() -> None:
    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    assert list(target_layers(model, "all-linear")) == pefts_choice(model, "all-linear")


def test_all_linear_is_every_linear_layer_but_the_head(base: Base) -> None:
    """Llama has seven linear layers per block; the head is no target in PEFT's all-linear."""
    wanted = {
        f"model.layers.{block}.{part}"
        for block in range(LAYERS)
        for part in (
            *(f"self_attn.{letter}_proj" for letter in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
    }
    assert target_layers(base.model, "all-linear").keys() == wanted


@pytest.mark.parametrize("modules", [["no_such_proj"], "no_such_proj", []])
def test_targets_that_name_nothing(base: Base, modules: list[str] | str) -> None:
    with pytest.raises(InputError, match="no linear layer of the model is so named") as caught:
        target_layers(base.model, modules)
    assert "\n" not in str(caught.value)
    assert str(modules) in str(caught.value)


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        (["norm"], "LlamaRMSNorm"),
        (["q_proj", "norm"], "LlamaRMSNorm"),
        (["q_proj", "embed_tokens"], "model.embed_tokens is a Embedding"),
        (["q_proj", "lm_head"], "lm_head is the output embedding"),
    ],
)
def test_targets_that_cannot_carry_one(base: Base, modules: list[str], named: str) -> None:
    """Named, not left out: a LoRA on fewer layers than asked for is another method."""
    with pytest.raises(InputError, match=named) as caught:
        target_layers(base.model, modules)
    assert "\n" not in str(caught.value)
    assert str(modules) in str(caught.value)


def test_experts_alone_are_refused() -> None:
    """By their names of transformers 4, which PEFT maps to the bare parameters of 5."""
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen3_moe", **ARCHITECTURES["qwen3_moe"], vocab_size=300)
    )
    with pytest.raises(InputError, match=r"only bare parameters \(model.layers.0.mlp.experts"):
        target_layers(model, ["gate_proj", "up_proj", "down_proj"])


# --- put in and put back --------------------------------------------------------------------------


def test_the_very_same_modules_come_back(fresh_base: MakeBase) -> None:
    model = fresh_base().model
    before = dict(model.named_modules())
    names = list(target_layers(model, "all-linear"))
    with grouped(model, names) as layers:
        assert list(layers) == names
        for name, layer in layers.items():
            assert model.get_submodule(name) is layer
            assert layer.linear is before[name]
            assert layer.weight is before[name].weight
    assert dict(model.named_modules()) == before
    with pytest.raises(RuntimeError, match="stop"), grouped(model, names):
        raise RuntimeError("stop")
    assert dict(model.named_modules()) == before
    # Also when one of the names is wrong, after others were replaced.
    with pytest.raises(AttributeError), grouped(model, [*names, "model.layers.0.nothing"]):
        pass
    assert dict(model.named_modules()) == before
    assert list(dict(model.named_modules())) == list(before)


def test_without_parts_it_is_the_layer(fresh_base: MakeBase) -> None:
    model = fresh_base().model
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        with grouped(model, list(target_layers(model, "all-linear"))):
            assert torch.equal(model(input_ids=IDS).logits, plain)


# --- the sum --------------------------------------------------------------------------------------


def test_by_hand() -> None:
    """W = [[1, 2]], bias 10. User 0: frozen 1 * 1, trained 3 * [5][1, 0]; user 1 the same, x 2."""
    linear = torch.nn.Linear(2, 1)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0]]))
        linear.bias.fill_(10.0)
    layer = GroupedLinear(linear)
    x = torch.tensor([[[1.0, 1.0]], [[1.0, 3.0]]])  # one row of one token per user
    a = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]])
    frozen = (a, torch.tensor([[[1.0]], [[2.0]]]), 1.0)
    trained = (torch.tensor([[[1.0, 0.0]]] * 2), torch.tensor([[[5.0]], [[10.0]]]), 3.0)
    layer.set(frozen, trained)
    # User 0: 10 + 3 + 1 + 15; user 1: 10 + 7 + 2 * 3 + 30.
    assert layer(x).flatten().tolist() == [29.0, 53.0]
    # Rows of a batch are the users' in turn, two per user here.
    twice = torch.cat([x[:1], x[:1], x[1:], x[1:]])
    assert layer(twice).flatten().tolist() == [29.0, 29.0, 53.0, 53.0]
    layer.set(None, None)
    assert layer(x).flatten().tolist() == [13.0, 17.0]


@pytest.mark.parametrize("parts", ["both", "frozen", "trained", "other layers"])
def test_logits_are_those_of_stock_peft(fresh_base: MakeBase, parts: str) -> None:
    """Three users with ranks 6 (under) and 2, two rows each; the reference has one at a time."""
    base = fresh_base()
    shapes = linear_shapes(base.model)
    some = {name: size for name, size in shapes.items() if name.endswith("q_proj")}
    unders = [random_lora(shapes, 6, 0.5, 10 + u, 0.2) for u in range(3)]
    owns = [
        random_lora(some if parts == "other layers" else shapes, 2, 2.0, 20 + u, 0.2)
        for u in range(3)
    ]
    rows = torch.cat([IDS + u for u in range(3)])

    with torch.no_grad(), grouped(base.model, list(shapes)) as layers:
        frozen = None if parts == "trained" else stacked(unders)
        trained = None if parts == "frozen" else stacked(owns)
        with assigned(layers, frozen, trained):
            got = base.model(input_ids=rows).logits
        plain = base.model(input_ids=rows).logits
    for user in range(3):
        stock = attached(
            fresh_base().model,
            under=None if parts == "trained" else unders[user],
            own=None if parts == "frozen" else owns[user],
        )
        with torch.no_grad():
            wanted = stock(input_ids=IDS + user).logits
        mine = slice(2 * user, 2 * user + 2)
        assert (wanted - plain[mine]).abs().max() > 0.1
        assert (got[mine] - wanted).abs().max() <= 1e-4


def test_one_user_s_gradient_sees_no_other(fresh_base: MakeBase) -> None:
    """d(sum of user 0's logits) / d(user 1's weights) is 0 to the last bit."""
    base = fresh_base()
    shapes = shapes_of(base.model, "all-linear", 2)
    flat = torch.randn(2, shapes.width, generator=torch.Generator().manual_seed(0))
    flat.mul_(0.1).requires_grad_(True)
    with (
        grouped(base.model, list(shapes.sizes)) as layers,
        assigned(layers, None, LoraBatch(shapes.split(flat), 2.0)),
    ):
        base.model(input_ids=IDS).logits[0].sum().backward()
    assert flat.grad is not None
    assert flat.grad[0].abs().max() > 0.1
    assert not flat.grad[1].any()


# --- flat rows ------------------------------------------------------------------------------------


def test_shapes_by_hand() -> None:
    """in 2, out 1 and in 1, out 3, rank 2: 4 + 2 and 2 + 6 numbers, as views."""
    shapes = Shapes({"x": (2, 1), "y": (1, 3)}, 2)
    assert shapes.width == 14
    flat = torch.arange(28.0).view(2, 14)
    split = shapes.split(flat)
    assert split["x"][0].tolist() == [[[0, 1], [2, 3]], [[14, 15], [16, 17]]]
    assert split["x"][1].tolist() == [[[4, 5]], [[18, 19]]]
    assert split["y"][0][1].tolist() == [[20], [21]]
    assert split["y"][1][0].tolist() == [[8, 9], [10, 11], [12, 13]]
    split["y"][1][1, 2, 1] = -1
    assert flat[1, 13] == -1


def test_shapes_of_a_model(base: Base) -> None:
    sizes = shapes_of(base.model, ["k_proj", "down_proj"], 3).sizes
    assert sizes == {
        name: (fan, out)
        for name, (out, fan) in sorted(linear_shapes(base.model).items())
        if re.search("k_proj|down_proj", name)
    }


def test_fresh_has_pefts_bounds_and_is_its_own(base: Base) -> None:
    """Kaiming uniform with a = sqrt 5 is sqrt(6 / (1 + 5) / in) = 1 / sqrt(in); B is zero."""
    shapes = shapes_of(base.model, "all-linear", 64)
    before = torch.random.get_rng_state()
    flat = fresh(shapes, [7, 8])
    assert torch.equal(torch.random.get_rng_state(), before)
    # One user's numbers are the same in any company and order.
    assert torch.equal(fresh(shapes, [8, 3, 7])[[2, 0]], flat)
    assert not torch.equal(flat[0], flat[1])
    assert torch.equal(fresh(shapes, [7], torch.float64)[0], flat[0].double())
    for a, b in shapes.split(flat[:1]).values():
        bound = a.shape[2] ** -0.5
        assert not b.any()
        assert 0.97 * bound < a.abs().max() <= bound
        # 64 x 32 uniform draws: the mean's standard error is bound / sqrt(3 * 2048) = 0.013 bound.
        assert abs(a.mean()) < 0.06 * bound
    assert shapes.split(flat)["model.layers.0.self_attn.q_proj"][0].shape == (2, 64, HIDDEN)


def test_join_undoes_loras(base: Base) -> None:
    """Row by row the same numbers, whatever order a user's layers come in."""
    shapes = shapes_of(base.model, "all-linear", 2)
    flat = torch.randn(3, shapes.width, generator=torch.Generator().manual_seed(0))
    loras = shapes.loras(flat, 2.0)
    reverse = [Lora(dict(reversed(lora.layers.items())), lora.scale) for lora in loras]
    assert torch.equal(shapes.join(reverse), flat)

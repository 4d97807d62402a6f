"""LoRAs' products in bfloat16 over a bfloat16 base, against float64 and stock PEFT."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from tasks.lora.adapters import LoraBatch
from tasks.lora.group_train import Gradients
from tasks.lora.grouped import GroupedLinear, fresh, grouped, shapes_of
from tasks.lora.merge import MergedUsers
from tasks.lora.train import Outcome
from tests.unit.lora import peft_reference
from tests.unit.lora.counters import operations
from tests.unit.lora.group_case import (
    RANK,
    RECIPES,
    SCALE,
    SEEDS,
    Group,
    bank_of,
    histories,
)
from tests.unit.lora.helpers import tiny_base, training

HALF = torch.bfloat16


def distance(one: Tensor, other: Tensor) -> float:
    """||one - other|| / ||other||."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


def test_a_layer_is_within_a_hundredth_of_float64() -> None:
    """Output and all gradients of two users' rows; a bfloat16 has 8 bits, so roundings of 0.4 %."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    linear = torch.nn.Linear(48, 40, bias=False).to(HALF).requires_grad_(False)
    x, gradient = draw(4, 7, 48).to(HALF), draw(4, 7, 40).to(HALF)
    frozen = (draw(2, 6, 48), draw(2, 40, 6), 0.5)
    a, b = draw(2, 3, 48), draw(2, 40, 3)

    def run(dtype: torch.dtype, low: torch.dtype | None) -> list[Tensor]:
        layer = GroupedLinear(torch.nn.Linear(48, 40, bias=False, dtype=dtype))
        layer.linear.weight = torch.nn.Parameter(linear.weight.to(dtype), False)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        inputs = [x.to(dtype), a.to(wide), b.to(wide)]
        inputs = [one.clone().requires_grad_() for one in inputs]
        layer.set((frozen[0].to(wide), frozen[1].to(wide), 0.5), (*inputs[1:], 2.0), low)
        out = layer(inputs[0])
        return [out, *torch.autograd.grad(out, inputs, gradient.to(dtype))]

    got, exact = run(HALF, HALF), run(torch.float64, None)
    assert [one.dtype for one in got] == [HALF, HALF, torch.float32, torch.float32]
    assert max(map(distance, got, exact)) < 1e-2
    # Products in float32 round the output only: the others came from half the digits.
    assert distance(run(HALF, None)[2], exact[2]) < distance(got[2], exact[2])


def test_a_layer_casts_no_activations() -> None:
    """Operations forward and backward: two products of the base's weight, six of the LoRAs'.

    In float32 over a bfloat16 base five tensors of 1,920 numbers are cast: x and what it is added
    to; back again G, x and what is added to dx. In bfloat16 two products add to what they go to.
    """
    layer = GroupedLinear(torch.nn.Linear(16, 16, bias=False, dtype=HALF).requires_grad_(False))
    x, gradient = torch.ones(6, 20, 16, dtype=HALF), torch.ones(6, 20, 16, dtype=HALF)
    a, b = torch.ones(3, 4, 16), torch.ones(3, 16, 4)
    inputs = [one.requires_grad_() for one in (x, a, b)]

    def counted(dtype: torch.dtype) -> tuple[int, ...]:
        layer.set((torch.ones(3, 4, 16), torch.ones(3, 16, 4), 1.0), (a, b, 2.0), dtype)
        ran = operations(lambda: torch.autograd.grad(layer(x), inputs, gradient))
        products = [
            sum(times for (name, _), times in ran.items() if name == product)
            for product in ("mm", "bmm", "baddbmm_")
        ]
        return (*products, ran["_to_copy", x.numel()])

    assert counted(torch.float32) == (2, 6, 0, 5)
    assert counted(HALF) == (2, 4, 2, 0)


def test_a_step_is_as_near_to_float32_as_peft_s_autocast() -> None:
    """The first step's losses and gradients of five users over merged LoRAs.

    PEFT keeps adapters in float32 over a bfloat16 base; under autocast it multiplies in bfloat16.
    """
    base = tiny_base()
    bank = bank_of(base.model)  # before its base is rounded: LoRAs are float32
    base.model.to(HALF)
    these = Group(base, training(), histories(), [*SEEDS], "exact")
    shapes = shapes_of(base.model, "all-linear", RANK)
    flat = fresh(shapes, SEEDS)
    flat += 0.05 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
    merged = MergedUsers(bank, RECIPES, "exact", base.device)

    def engine(dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        gradient, outcome = torch.zeros_like(flat), Outcome(flat, [[] for _ in SEEDS], [0] * 5)
        with grouped(base.model, list(shapes.sizes)) as layers:
            split = lambda _, rows: LoraBatch(shapes.split(rows), SCALE)  # noqa: E731
            work = Gradients(replace(base, adapter_dtype=dtype), layers, split, merged.parts,
                             10_000, outcome)  # fmt: skip
            losses = work.fill(gradient, flat, dict(enumerate(these.samples)))
        return gradient, losses

    def stock(user: int, autocast: bool) -> tuple[Tensor, float]:
        members, weights = RECIPES[user]
        under = peft_reference.merged_by_hand([bank.lora(m) for m in members], weights, "exact")
        own = shapes.loras(flat[user : user + 1], SCALE)[0]
        model = peft_reference.attached(base.model, under=under, own=own)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
            parameter.requires_grad_(".own." in name)
        peft_reference.fill(model, "under", under)
        peft_reference.fill(model, "own", own)
        samples = these.samples[user]
        with torch.autocast("cpu", HALF, enabled=autocast):
            loss = peft_reference.loss_of(model, samples, sum(len(s.answer) for s in samples))
        loss.backward()
        places = peft_reference.places(model, "own")
        grads = [one.grad for one in chain(*(places[name] for name in shapes.sizes))]
        return torch.cat([one.flatten() for one in grads if one is not None]), float(loss.detach())

    got, losses = engine(HALF)
    assert got.dtype == torch.float32
    wide, _ = engine(None)
    for user in range(len(SEEDS)):
        exact, loss = stock(user, False)
        rounded, _ = stock(user, True)
        assert abs(losses[user] - loss) < 1e-2 * loss
        assert distance(got[user], exact) < distance(rounded, exact) < 0.05
        assert distance(wide[user], exact) < 0.01


def test_it_learns_as_with_float32() -> None:
    """Fifteen epochs by heart: every user's last loss is that with float32 adapters, to 2 %."""
    options = training(learning_rate=1e-2, epochs=15, batch_size=4, schedule="constant")
    ends: list[Tensor] = []
    for dtype in (None, HALF):
        base = tiny_base()
        base.model.to(HALF)
        these = Group(replace(base, adapter_dtype=dtype), options, histories()[:2], [*SEEDS[:2]])
        loras, outcome = these.together()
        assert outcome.flat.dtype == torch.float32
        assert loras[0].layers["model.layers.0.self_attn.q_proj"][0].dtype == torch.float32
        assert {one.dtype for one in base.model.parameters()} == {HALF}
        assert all(losses[-1] < 0.3 * losses[0] for losses in outcome.losses)
        ends.append(torch.tensor([losses[-1] for losses in outcome.losses]))
    assert ((ends[1] - ends[0]).abs() < 0.02 * ends[0]).all()

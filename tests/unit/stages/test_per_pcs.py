"""LoRAs assembled of pieces: gates, means and pieces by hand, and a small run."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.config.run import resolve
from tasks.errors import InputError
from tasks.export import Finished, export
from tasks.lora.adapters import Lora, read_peft
from tasks.lora.bank import Bank, read_bank, stack
from tasks.lora.base import Base, load_base
from tasks.lora.batches import Encoded, encode
from tasks.lora.signature import hooked, mean_inputs
from tasks.methods.per_pcs import FILE, GateOptions, assemble, gated, trained_gates
from tasks.personalise.personaliser import Personaliser
from tasks.report.table import costs
from tasks.results.run import Cell, Run
from tasks.results.store import store
from tests.unit.lora.helpers import added_to, delta, linear_shapes, random_lora, sample, tiny_base
from tests.unit.stages.pipeline import ONE_MORE_ITEM, ROLES, run, stage_keys

METHOD = "per_pcs"
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base()


def bank_on(base: Base, scale: float = 0.75) -> Bank:
    shapes = {name: size for name, size in linear_shapes(base.model).items() if name in NAMES}
    return stack("abc", [random_lora(shapes, 3, scale, seed, 0.3) for seed in (1, 2, 3)])


def some(seed: int) -> list[Encoded]:
    return [sample(10 * seed + n, 3 + 2 * n, 1 + n % 3) for n in range(6)]


def loss_by_hand(base: Base, bank: Bank, gates: dict[str, Any], samples: list[Encoded]) -> Any:
    """Mean over answer tokens; y = W x + s sigmoid(g . x) B A x, by plain hooks, one by one."""
    handles = []
    for name, (a, b) in bank.layers.items():

        def add(_m: Any, x: Any, out: Any, a: Any = a[0], b: Any = b[0], name: str = name) -> Any:
            gate = torch.sigmoid(torch.einsum("btd,d->bt", x[0], gates[name]))
            return out + bank.scale * gate[..., None] * torch.einsum("or,rd,btd->bto", b, a, x[0])

        handles.append(base.model.get_submodule(name).register_forward_hook(add))
    total, count = torch.zeros(()), 0
    for one in samples:
        logits = base.model(input_ids=torch.tensor([one.prompt + one.answer])).logits[0]
        log_p = logits[len(one.prompt) - 1 : -1].log_softmax(-1)
        total = total - log_p[range(len(one.answer)), one.answer].sum()
        count += len(one.answer)
    for handle in handles:
        handle.remove()
    return total / count


def test_gates_are_trained_by_adam_with_the_lora_frozen(base: Base) -> None:
    """Three steps of two items in turn, by plain autograd, from gates of 0."""
    bank, options = bank_on(base), GateOptions(steps=3, learning_rate=0.05, items=2)
    got = trained_gates(base, bank, [some(1), some(2), some(3)], options)
    for anchor in range(3):
        own, samples = bank.of([anchor]), some(anchor + 1)
        one = Bank(own.layers, own.scale, ("one",))
        gates = {
            name: torch.zeros(a.shape[2]).requires_grad_() for name, (a, _) in own.layers.items()
        }
        adam = torch.optim.Adam([*gates.values()], lr=0.05)
        for step in range(3):
            adam.zero_grad()
            loss_by_hand(base, one, gates, samples[2 * step : 2 * step + 2]).backward()
            adam.step()
        for name, gate in gates.items():
            assert (got[name][anchor] - gate.detach()).abs().max() < 1e-3
            assert gate.detach().abs().max() > 0.1
    # The model is as it was: no hook is left.
    assert not any(module._forward_hooks for module in base.model.modules())


def test_gates_are_the_same_in_small_passes(base: Base) -> None:
    """With checkpointing too, and then the model is in training; afterwards it is not."""
    bank, options = bank_on(base), GateOptions(steps=3, learning_rate=0.05, items=4)
    wanted = trained_gates(base, bank, [some(1), some(2), some(3)], options)
    modes: list[bool] = []
    base.model.gradient_checkpointing_enable()
    hook = base.model.register_forward_pre_hook(lambda model, _: modes.append(model.training))
    try:
        got = trained_gates(base, bank, [some(1), some(2), some(3)], options, positions=1)
    finally:
        hook.remove()
        base.model.gradient_checkpointing_disable()
    # Item by item: three anchors' three steps of four.
    assert modes == [True] * 36
    assert not base.model.training
    for name, gate in wanted.items():
        assert (got[name] - gate).abs().max() < 1e-3


def test_stock_peft_is_refused() -> None:
    """Its bank may have layers that are no modules: matrices of a bare parameter."""
    with pytest.raises(InputError, match=f"methods: {METHOD} needs base.engine=grouped"):
        resolve({"methods": [METHOD], "base": {"engine": "peft"}})


def test_a_gate_of_zeros_lets_half_of_the_lora_through(base: Base) -> None:
    """sigmoid(0) = 1/2: the logits are those of half of the update added to the weights."""
    lora, ids = bank_on(base).lora("b"), torch.arange(3, 20)[None]
    dense = copy.deepcopy(base.model)
    added_to(dense, Lora(lora.layers, lora.scale / 2))
    gates = {name: torch.zeros(a.shape[1]) for name, (a, _) in lora.layers.items()}
    with torch.no_grad(), hooked(base, [*gates], partial(gated, lora, gates)):
        found = base.model(ids).logits
    with torch.no_grad():
        assert (found - dense(ids).logits).abs().max() < 1e-4
        assert (found - base.model(ids).logits).abs().max() > 1e-2


def test_means_are_those_of_all_tokens(base: Base) -> None:
    """By plain hooks, a sample at a time."""
    samples, seen = some(5), {name: [] for name in NAMES}
    got = mean_inputs(base, NAMES, samples)
    for one in samples:
        handles = [
            base.model.get_submodule(name).register_forward_pre_hook(
                lambda _m, x, name=name: seen[name].append(x[0][0])
            )
            for name in NAMES
        ]
        with torch.no_grad():
            base.model(input_ids=torch.tensor([one.prompt + one.answer]))
        for handle in handles:
            handle.remove()
    for name in NAMES:
        assert torch.allclose(got[name], torch.cat(seen[name]).mean(0), atol=1e-5)


def test_pieces_by_hand(base: Base) -> None:
    """Gates of one number each: scores 3, 1 and 2 in one layer, -1, 0 and -3 in the other."""
    bank = bank_on(base)
    first, second = NAMES
    sizes = {name: a.shape[2] for name, (a, _) in bank.layers.items()}
    gates = {name: torch.zeros(3, size) for name, size in sizes.items()}
    gates[first][:, 0] = torch.tensor([3.0, 1.0, 2.0])
    gates[second][:, 0] = torch.tensor([-1.0, 0.0, -3.0])
    means = {name: torch.eye(size)[0] for name, size in sizes.items()}
    got = assemble(bank, gates, means, 2)
    near = 1 / (1 + math.exp(-1))
    for name, (one, other) in ((first, "ac"), (second, "ba")):
        wanted = near * delta(bank.lora(one), name) + (1 - near) * delta(bank.lora(other), name)
        assert (delta(got, name) - wanted).abs().max() < 1e-5
    assert got.rank == 6


@pytest.fixture(scope="module")
def cell(place: Path) -> Cell:
    return run(place, ROLES, methods=["merge_only", METHOD])


def test_in_a_small_run(place: Path, cell: Cell, tmp_path: Path) -> None:
    """Exported: the pieces that the stored gates and the user's own means pick, two a layer."""
    made = Run(id="one", name="one", date="", report="one", config={}, cells=(cell,))
    merging, (folder,) = cell.merging(METHOD), store().folders("gates")
    assert merging
    bank, gates = read_bank(store().path(merging.merged.bank.file)), load_file(folder / FILE)
    loaded = load_base(place / "model", max_tokens=64, device="cpu")
    users = {}
    for user in ROLES["few_shot"]:
        name = user["user_id"]
        export(Finished(made, "LaMP-2M", METHOD), name, tmp_path / name)
        users[name] = read_peft(tmp_path / name)
        items = [
            encode(loaded, f"description: {item['description']} tag:", item["tag"])
            for item in user["profile"]
        ]
        wanted = assemble(bank, gates, mean_inputs(loaded, [*bank.layers], items), 2)
        for layer in wanted.layers:
            assert (delta(users[name], layer) - delta(wanted, layer)).abs().max() < 1e-5
    one, other = users["few-0"], users["few-1"]
    assert max((delta(one, n) - delta(other, n)).abs().max() for n in one.layers) > 1e-6
    # 14 layers, two pieces each of 6 bytes; of the recipe, which names the anchors, the rest.
    (batch,) = cell.answers[METHOD]
    assert batch.bytes_per_user == 14 * 2 * 6
    assert costs(cell, METHOD)["steps_per_user"] == 0
    with pytest.raises(InputError, match=f"--method {METHOD}: makes its LoRAs in a way that new"):
        Personaliser(cell, METHOD)


def test_only_who_changed_is_assembled_again(
    place: Path, cell: Cell, work: dict[str, list[Any]]
) -> None:
    with stage_keys() as keys:
        run(place, ROLES, methods=[METHOD])
    assert (work["answers"], len(keys["gates"]), "evidence" in keys) == ([], 1, False)
    run(place, ONE_MORE_ITEM, methods=[METHOD])
    assert work["answers"] == [["few-0"]]

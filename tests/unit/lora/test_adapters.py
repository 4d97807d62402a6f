"""LoRAs as tensors and as PEFT folders. The reference is stock PEFT, or the sum W + s B A."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.errors import InputError
from tasks.lora import adapters
from tasks.lora.adapters import Lora
from tasks.lora.base import Base
from tasks.lora.grouped import assigned, grouped
from tasks.lora.merge import concatenate, merge
from tests.unit.lora.helpers import (
    LAYERS,
    MakeBase,
    added_to,
    delta,
    equal_tensors,
    linear_shapes,
    random_lora,
    same,
    stacked,
)
from tests.unit.lora.peft_reference import attached

IDS = torch.tensor([[5, 80, 33, 290, 7, 112, 64, 3], [9, 8, 7, 6, 5, 4, 3, 250]])


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@torch.no_grad()
def grouped_logits(base: Base, lora: Lora, under: Lora | None = None) -> Tensor:
    """The same LoRA as the engine runs it, for a single user."""

    names = sorted({*lora.layers, *(under.layers if under else ())})
    with (
        grouped(base.model, names) as layers,
        assigned(layers, stacked([under]) if under else None, stacked([lora])),
    ):
        return logits(base.model)


def assert_close(got: Tensor, wanted: Tensor, plain: Tensor) -> None:
    """Equal within 1e-4, where the LoRA moves the logits by far more than that."""
    assert (wanted - plain).abs().max() > 0.1
    assert (got - wanted).abs().max() <= 1e-4


def test_anchors_folder_in_stock_peft(fresh_base: MakeBase, tmp_path: Path) -> None:
    """The folder in stock PEFT, against the sum W + s B A (Hu et al. 2021, equation 3)."""
    base = fresh_base()
    plain = logits(base.model)
    lora = random_lora(linear_shapes(base.model), rank=5, scale=1.7, seed=1)
    adapters.write_peft(tmp_path / "anchor", lora, "some/base")
    stock = logits(PeftModel.from_pretrained(fresh_base().model, tmp_path / "anchor"))
    assert_close(grouped_logits(base, lora), stock, plain)
    summed = fresh_base().model
    added_to(summed, lora)
    assert_close(stock, logits(summed), plain)


@pytest.mark.parametrize("how", ["exact", "factors", "svd"])
def test_users_one_folder_in_stock_peft(fresh_base: MakeBase, tmp_path: Path, how: str) -> None:
    """Merged (rank 6 or 3, scale 0.75) and stacked (rank 2, scale 2) exported as one LoRA."""
    base = fresh_base()
    plain = logits(base.model)
    shapes = linear_shapes(base.model)
    anchors = [random_lora(shapes, 3, 0.75, seed) for seed in (1, 2)]
    merged = merge(anchors, [0.7, 0.3], how)
    stacked = random_lora(shapes, 2, 2.0, seed=9, spread=0.2)
    adapters.write_peft(tmp_path / "user", concatenate(merged, stacked), "some/base")
    stock = logits(PeftModel.from_pretrained(fresh_base().model, tmp_path / "user"))
    both = logits(attached(fresh_base().model, merged=merged, stacked=stacked))
    assert_close(stock, both, plain)
    assert_close(grouped_logits(base, stacked, merged), both, plain)
    summed = fresh_base().model
    added_to(summed, merged, stacked)
    assert_close(both, logits(summed), plain)
    # Either one alone is another model, so both were active.
    for lora in (merged, stacked):
        assert (logits(attached(fresh_base().model, only=lora)) - both).abs().max() > 0.1


def test_a_folder_of_stock_peft_is_read(fresh_base: MakeBase, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    stock = get_peft_model(fresh_base().model, config)
    stock.save_pretrained(tmp_path / "stock")
    lora = adapters.read_peft(tmp_path / "stock")
    assert (lora.rank, lora.scale, len(lora.layers)) == (4, 3.0, 2 * LAYERS)
    base = fresh_base()
    assert_close(grouped_logits(base, lora), logits(stock), logits(base.model))


@settings(deadline=None, max_examples=40)
@given(
    rank=st.integers(1, 9),
    alpha=st.sampled_from([1.0, 8.0, 10.0, 16.0, 0.3, 7.7]),
    seed=st.integers(0, 1000),
)
def test_folder_round_trip_is_bitwise(
    tmp_path_factory: pytest.TempPathFactory, rank: int, alpha: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("peft") / "deep" / "folder"
    lora = random_lora({"model.a": (3, 5), "model.b.c": (7, 2)}, rank, alpha / rank, seed)
    adapters.write_peft(folder, lora, "base")
    back = adapters.read_peft(folder)
    assert equal_tensors(back, lora)
    # The folder keeps alpha, as PEFT does; the scale comes back to the last bit or next to it.
    assert back.scale == pytest.approx(lora.scale, rel=1e-15)
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_bank_s_scale_survives_the_folder(tmp_path: Path) -> None:
    """The configured scales, alpha 16 of rank 8 and alpha 8 of rank 4, exactly."""
    for rank, alpha in ((8, 16.0), (4, 8.0)):
        lora = random_lora({"x": (3, 5)}, rank, alpha / rank, 0)
        adapters.write_peft(tmp_path / str(rank), lora, "base")
        assert same(adapters.read_peft(tmp_path / str(rank)), lora)


def test_keys_are_those_of_stock_peft(fresh_base: MakeBase, tmp_path: Path) -> None:
    base = fresh_base()
    shapes = linear_shapes(base.model)
    adapters.write_peft(tmp_path / "ours", random_lora(shapes, 2, 1.0, 0), "base")
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base.model, config).save_pretrained(tmp_path / "stock")
    ours, stock = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "stock")
    )
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in stock.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"bias": "all"},
        {"peft_type": "LOHA"},
        {"peft_type": None},
    ],
)
def test_other_kinds_of_adapters_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    adapters.write_peft(tmp_path, random_lora({"x": (3, 5)}, 2, 1.0, 0), "base")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match="only plain LoRA"):
        adapters.read_peft(tmp_path)


def test_two_writings_are_the_same_bytes(tmp_path: Path) -> None:
    """Layers in order: PEFT's set of them has another order in each process."""
    layers = {f"model.layers.{n}.q_proj": (3, 5) for n in range(20)}
    adapters.write_peft(tmp_path, random_lora(layers, 2, 1.0, 0), "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(layers)
    assert config["base_model_name_or_path"] == "base"


def test_other_weights_in_the_file_are_refused(tmp_path: Path) -> None:
    """Such as a saved head, or a matrix without its other half: to leave it out is another LoRA."""
    lora = random_lora({"x": (3, 5)}, 2, 1.0, 0)
    for number, change in enumerate(["add", "drop"]):
        folder = tmp_path / str(number)
        adapters.write_peft(folder, lora, "base")
        tensors = load_file(folder / "adapter_model.safetensors")
        if change == "add":
            tensors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)
        else:
            del tensors["base_model.model.x.lora_A.weight"]
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(InputError, match="two matrices per layer"):
            adapters.read_peft(folder)


def test_a_rank_that_is_not_the_configured_one_is_refused(tmp_path: Path) -> None:
    adapters.write_peft(tmp_path, random_lora({"x": (3, 5)}, 2, 1.0, 0), "base")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 4}))
    with pytest.raises(InputError, match="x is of rank 2, not 4"):
        adapters.read_peft(tmp_path)


def test_stock_dora_folder_is_refused(fresh_base: MakeBase, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    get_peft_model(fresh_base().model, config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="it has use_dora=True"):
        adapters.read_peft(tmp_path)


def test_pickles_and_broken_folders_are_refused(tmp_path: Path) -> None:
    """The folder is named in the message; a pickle beside the configuration is never opened."""

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "exploded",))  # type: ignore[return-value]

    lora = random_lora({"x": (3, 5)}, 2, 1.0, 0)
    pickled = tmp_path / "pickled"
    adapters.write_peft(pickled, lora, "base")
    (pickled / "adapter_model.safetensors").unlink()
    torch.save(Bomb(), pickled / "adapter_model.bin")
    cut = tmp_path / "cut"
    adapters.write_peft(cut, lora, "base")
    weights = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(weights[:-3])
    bare = tmp_path / "bare"
    adapters.write_peft(bare, lora, "base")
    (bare / "adapter_config.json").unlink()
    for folder in (pickled, cut, bare, tmp_path / "absent"):
        with pytest.raises(InputError, match=f"{folder.name}: not a readable PEFT folder"):
            adapters.read_peft(folder)
    assert not (tmp_path / "exploded").exists()


def test_patterns_are_refused(fresh_base: MakeBase, tmp_path: Path) -> None:
    """`Raises InputError for anything else` than a plain LoRA: here k_proj has its own alpha."""
    config = LoraConfig(
        r=2,
        lora_alpha=2,
        target_modules=["q_proj", "k_proj"],
        alpha_pattern={"k_proj": 8},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(fresh_base().model, config).save_pretrained(tmp_path)
    with pytest.raises(InputError):
        adapters.read_peft(tmp_path)


def test_delta_by_hand() -> None:
    """2 * [[1], [3]] @ [[10, 20]]."""
    lora = adapters.Lora({"x": (torch.tensor([[10.0, 20.0]]), torch.tensor([[1.0], [3.0]]))}, 2.0)
    assert delta(lora, "x").tolist() == [[20.0, 40.0], [60.0, 120.0]]
    assert lora.rank == 1

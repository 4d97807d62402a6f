"""The bank: what goes in comes out, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tasks.lora.adapters import read_peft, write_peft
from tasks.lora.bank import read_bank, stack, write_bank
from tests.unit.lora.helpers import random_lora, same

SHAPES = {"model.b": (3, 5), "model.a.A": (4, 2)}


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=5, unique=True),
    st.integers(1, 4),
    st.sampled_from([2.0, 16 / 3, 0.1]),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str], rank: int, scale: float
) -> None:
    loras = [random_lora(SHAPES, rank, scale, seed) for seed in range(len(ids))]
    file = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    write_bank(file, stack(ids, loras))
    bank = read_bank(file)
    assert (bank.ids, bank.rank, bank.scale) == (tuple(ids), rank, scale)
    for member, lora in zip(ids, loras, strict=True):
        assert same(bank.lora(member), lora)


def test_shapes_in_the_file(tmp_path: Path) -> None:
    """[K, r, in] and [K, out, r] in float32, as the module says."""
    loras = [random_lora(SHAPES, 2, 2.0, seed) for seed in range(3)]
    write_bank(tmp_path / "bank.safetensors", stack("abc", loras))
    tensors = load_file(tmp_path / "bank.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "model.b.A": (3, 2, 5),
        "model.b.B": (3, 3, 2),
        "model.a.A.A": (3, 2, 2),
        "model.a.A.B": (3, 4, 2),
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_same_bank_is_the_same_bytes(tmp_path: Path) -> None:
    """Twenty times: a header of two entries came out in either order, about half of the times."""
    bank = stack("abc", [random_lora(SHAPES, 2, 2.0, seed) for seed in range(3)])
    written = set()
    for number in range(20):
        write_bank(tmp_path / f"{number}.safetensors", bank)
        written.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(written) == 1


def test_a_member_exports_as_a_folder(tmp_path: Path) -> None:
    loras = [random_lora(SHAPES, 2, 2.0, seed) for seed in range(3)]
    write_peft(tmp_path / "b", stack("abc", loras).lora("b"), "base")
    assert same(read_peft(tmp_path / "b"), loras[1])


def test_a_stranger_is_not_in_it() -> None:
    bank = stack(["a"], [random_lora(SHAPES, 2, 2.0, 0)])
    with pytest.raises(ValueError, match="not in tuple"):
        bank.lora("stranger")


def test_members_must_agree() -> None:
    first = random_lora(SHAPES, 2, 2.0, 0)
    for other in (random_lora(SHAPES, 2, 2.5, 1), random_lora({"model.b": (3, 5)}, 2, 2.0, 1)):
        with pytest.raises(ValueError, match="one scale, one rank and the same layers"):
            stack(["a", "b"], [first, other])


def test_members_of_another_rank_are_named() -> None:
    loras = [random_lora(SHAPES, 2, 2.0, 0), random_lora(SHAPES, 3, 2.0, 1)]
    with pytest.raises(ValueError, match="one scale, one rank and the same layers"):
        stack(["a", "b"], loras)

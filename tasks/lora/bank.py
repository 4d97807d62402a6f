"""The bank: K anchors' LoRAs in one safetensors file.

Per layer `<name>.A` [K, r, in] and `<name>.B` [K, out, r], float32; ids and scale in the header.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tasks.lora.adapters import Lora
from tasks.lora.grouped import Part


@dataclass(frozen=True)
class Bank:
    """K LoRAs of one shape: layer name -> (A [K, r, in], B [K, out, r])."""

    ids: tuple[str, ...]
    layers: dict[str, tuple[Tensor, Tensor]]
    scale: float

    @property
    def rank(self) -> int:
        return next(iter(self.layers.values()))[0].shape[1]

    def lora(self, member: str) -> Lora:
        """The LoRA of one member. Raises KeyError when it is not in the bank."""
        if member not in self.ids:
            raise KeyError(f"{member} is not in the bank")
        k = self.ids.index(member)
        return Lora({name: (a[k], b[k]) for name, (a, b) in self.layers.items()}, self.scale)

    def parts(self, k: int, device: torch.device) -> dict[str, Part]:
        """Member number `k` as the part of one user, layer by layer."""
        return {
            name: Part(a[k : k + 1].to(device), b[k : k + 1].to(device), self.scale)
            for name, (a, b) in self.layers.items()
        }


def stack(ids: Sequence[str], loras: Sequence[Lora]) -> Bank:
    """A bank of LoRAs. Raises ValueError where they differ in layers, rank or scale."""
    first = loras[0]
    for member, lora in zip(ids, loras, strict=True):
        same = lora.scale == first.scale and lora.rank == first.rank
        if not same or lora.layers.keys() != first.layers.keys():
            raise ValueError(f"LoRA of {member} differs from the bank's in scale, rank or layers")
    layers = {
        name: (
            torch.stack([lora.layers[name][0] for lora in loras]),
            torch.stack([lora.layers[name][1] for lora in loras]),
        )
        for name in sorted(first.layers)
    }
    return Bank(tuple(ids), layers, first.scale)


def write_bank(path: Path, bank: Bank) -> None:
    tensors = {}
    for name, (a, b) in bank.layers.items():
        tensors[f"{name}.A"], tensors[f"{name}.B"] = a.contiguous(), b.contiguous()
    # One entry: safetensors writes several in random order.
    about = json.dumps({"ids": list(bank.ids), "scale": bank.scale})
    save_file(tensors, path, metadata={"bank": about})


def read_bank(path: Path) -> Bank:
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["bank"])
        names = sorted({key[:-2] for key in file.keys()})  # noqa: SIM118  (not a dict)
        layers = {
            name: (file.get_tensor(f"{name}.A"), file.get_tensor(f"{name}.B")) for name in names
        }
    return Bank(tuple(about["ids"]), layers, about["scale"])

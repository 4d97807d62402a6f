"""The bank: K anchors' LoRAs in one safetensors file.

Per layer `<name>.A` [K, r, in] and `<name>.B` [K, out, r], float32; ids and scale in the header.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tasks.lora.adapters import Lora, LoraBatch


@dataclass(frozen=True)
class Bank(LoraBatch):
    """LoRAs of one shape; `ids`: their members, in the same order."""

    ids: tuple[str, ...]

    def lora(self, member: str) -> Lora:
        """The LoRA of one member. Raises ValueError if it is not in the bank."""
        return self.one(self.ids.index(member))


def stack(ids: Sequence[str], loras: Sequence[Lora]) -> Bank:
    """A bank of LoRAs. Raises ValueError if they differ in layers, rank or scale."""
    first = loras[0]
    if len({(lora.scale, lora.rank, *sorted(lora.layers)) for lora in loras}) > 1:
        raise ValueError("LoRAs of a bank have one scale, one rank and the same layers")
    layers = {}
    for name in sorted(first.layers):
        pairs = [lora.layers[name] for lora in loras]
        layers[name] = (torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs]))
    return Bank(layers, first.scale, tuple(ids))


def write_bank(path: Path, bank: Bank) -> None:
    """Write the bank to one file, the same bytes every time."""
    tensors = {}
    for name, (a, b) in bank.layers.items():
        tensors[f"{name}.A"], tensors[f"{name}.B"] = a.contiguous(), b.contiguous()
    # One header entry: safetensors writes several in random order.
    about = json.dumps({"ids": list(bank.ids), "scale": bank.scale})
    save_file(tensors, path, metadata={"bank": about})


def read_bank(path: Path) -> Bank:
    """Read what `write_bank` wrote."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["bank"])
        names = sorted({key[:-2] for key in file.keys()})  # noqa: SIM118  (not a dict)
        layers = {n: (file.get_tensor(f"{n}.A"), file.get_tensor(f"{n}.B")) for n in names}
    return Bank(layers, about["scale"], tuple(about["ids"]))

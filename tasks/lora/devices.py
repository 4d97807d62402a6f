"""Where a model runs, and in which number formats."""

from __future__ import annotations

import torch

from tasks.errors import InputError


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one. Raises InputError for `cuda` without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "compute.device: cuda was asked for, but torch sees no GPU; use auto or cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def pick_adapter_dtype(name: str, device: torch.device, base: torch.dtype) -> torch.dtype | None:
    """`auto` is bfloat16 over a bfloat16 base on a GPU; None, the LoRAs' own float32, elsewhere."""
    narrow = device.type == "cuda" and base == torch.bfloat16
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and narrow) else None

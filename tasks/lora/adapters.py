"""LoRA weights as plain tensors, and the PEFT folder they are stored in.

A LoRA adds `scale * B @ A` to a linear layer's weight, with A [r, in], B [out, r] and
`scale = alpha / r` (Hu et al. 2021, section 4.1). Here weights are kept by the layer's name in
the base model, e.g. `model.layers.0.self_attn.q_proj`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.errors import InputError

_PREFIX = "base_model.model."
# How files are called that torch, joblib or pickle itself would execute on loading.
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
# What makes a LoRA's update something else than alpha / r * B @ A in every layer.
_NOT_PLAIN = ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern")


@dataclass(frozen=True)
class Lora:
    """Weights of one LoRA: layer name -> (A [r, in], B [out, r]), and their common `scale`."""

    layers: dict[str, tuple[Tensor, Tensor]]
    scale: float

    @property
    def rank(self) -> int:
        return next(iter(self.layers.values()))[0].shape[0]


def pickled_files(folder: Path) -> list[Path]:
    """The files in a folder, and below, that are named as pickles are; by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICKLED)


def write_peft(folder: Path, lora: Lora, base_model: str) -> None:
    """Write `lora` as an ordinary PEFT folder (adapter_config.json, adapter_model.safetensors)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer, (a, b) in sorted(lora.layers.items()):
        tensors[f"{_PREFIX}{layer}.lora_A.weight"] = a.contiguous()
        tensors[f"{_PREFIX}{layer}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # Full names, not "all-linear": which layers those are is decided by the weights we hold.
        "target_modules": sorted(lora.layers),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_peft(folder: Path) -> Lora:
    """Read a PEFT folder that holds a plain LoRA. Raises InputError for anything else."""
    path = folder / "adapter_model.safetensors"
    if not path.exists() and (pickles := pickled_files(folder)):
        raise InputError(
            f"{folder}: not a readable PEFT folder ({pickles[0].name} is a pickle, which would run "
            "code, and is never read); save the adapter as adapter_model.safetensors"
        )
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(path)
    except Exception as error:
        raise InputError(f"{folder}: not a readable PEFT folder ({error})") from error
    if config.get("peft_type") != "LORA" or any(config.get(name) for name in _NOT_PLAIN):
        raise InputError(
            f"{folder}: only plain LoRA is read, not DoRA, rsLoRA, patterns of rank or alpha, "
            "or another PEFT type"
        )
    layers = {}
    for key in sorted(tensors):
        if key.endswith(".lora_A.weight"):
            layer = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
            other = key.replace(".lora_A.", ".lora_B.")
            if other not in tensors:
                raise InputError(f"{path}: {key} has no {other}; the file is not whole")
            layers[layer] = (tensors[key], tensors[other])
    if not layers:
        raise InputError(f"{path}: holds no LoRA weights")
    for name in ("lora_alpha", "r"):
        if not isinstance(config.get(name), int | float) or not config[name]:
            raise InputError(f"{folder}/adapter_config.json: {name} must be a number, not 0")
    return Lora(layers, config["lora_alpha"] / config["r"])

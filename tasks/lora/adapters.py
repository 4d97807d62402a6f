"""LoRA weights as plain tensors, and the PEFT folder they are stored in.

A LoRA adds `scale * B @ A` to a linear layer's weight, with A [r, in], B [out, r] and
`scale = alpha / r` (Hu et al. 2021, section 4.1). A layer is named as in the base model,
e.g. `model.layers.0.self_attn.q_proj`.

Each matrix of a bare parameter [E, out, in], such as the experts of transformers 5, is a layer of
its own. Its name is PEFT's wrapper, the parameter and the number of the matrix:
`model.layers.0.mlp.experts.base_layer.gate_up_proj[3]` (wrappers of one module are nested).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftType, TaskType
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.errors import InputError, short

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
A, B = ".lora_A.weight", ".lora_B.weight"
# Fields of a LoraConfig. If one is set, the update is not scale * B @ A in every layer.
_NOT_PLAIN = (
    "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "use_qalora",
    "trainable_token_indices", "alora_invocation_tokens", "layer_replication", "use_bdlora",
    "monteclora_config", "arrow_config", "kasa_config",
)  # fmt: skip
# `init_lora_weights` that leave the base model as it is. Others (PiSSA, CorDA, ...) change it.
_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")
_MATRIX = re.compile(r"(?P<wrapper>.+)\.(?P<parameter>\w+)\[(?P<number>\d+)\]")

# A and B of a layer. A `Part` has the scale, too.
Factors = tuple[Tensor, Tensor]
Part = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class Lora:
    """Weights of one LoRA: layer name -> (A [r, in], B [out, r]), and their common `scale`."""

    layers: dict[str, Factors]
    scale: float

    @property
    def rank(self) -> int:
        return next(iter(self.layers.values()))[0].shape[0]

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Layer -> (in, out)."""
        return {name: (a.shape[1], b.shape[0]) for name, (a, b) in self.layers.items()}


@dataclass(frozen=True)
class LoraBatch:
    """LoRAs of one shape: layer name -> (A [U, r, in], B [U, out, r]), and their `scale`."""

    layers: dict[str, Factors]
    scale: float

    @property
    def rank(self) -> int:
        return next(iter(self.layers.values()))[0].shape[1]

    @property
    def count(self) -> int:
        return len(next(iter(self.layers.values()))[0])

    def part(self, layer: str) -> Part | None:
        """A, B and the scale on a layer, if there is a LoRA on it."""
        return (*self.layers[layer], self.scale) if layer in self.layers else None

    def of(self, users: Sequence[int]) -> LoraBatch:
        """The LoRAs of `users` (their numbers), in this order, gathered on the device."""
        # The host does not wait until the numbers are copied.
        device = next(iter(self.layers.values()))[0].device
        rows = torch.tensor([*users]).to(device, non_blocking=True)
        layers = {name: (a[rows], b[rows]) for name, (a, b) in self.layers.items()}
        return LoraBatch(layers, self.scale)

    def to(self, device: torch.device) -> LoraBatch:
        layers = {name: (a.to(device), b.to(device)) for name, (a, b) in self.layers.items()}
        return LoraBatch(layers, self.scale)

    def one(self, user: int) -> Lora:
        """The LoRA of one user, a copy."""
        layers = {name: (a[user].clone(), b[user].clone()) for name, (a, b) in self.layers.items()}
        return Lora(layers, self.scale)


def to_peft(lora: Lora) -> tuple[LoraConfig, dict[str, Factors]]:
    """The LoRA as stock PEFT has it: its configuration, and A and B by the name of PEFT's layer.

    All matrices of a bare parameter share one layer, with A [E * r, in] and B [out, r * E].
    """
    layers: dict[str, Factors] = {}
    experts: defaultdict[tuple[str, str], dict[int, Factors]] = defaultdict(dict)
    for name, factors in lora.layers.items():
        if match := _MATRIX.fullmatch(name):
            experts[match["wrapper"], match["parameter"]][int(match["number"])] = factors
        else:
            layers[name] = factors
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale * lora.rank,  # type: ignore[arg-type]  # PEFT takes any number
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
    )
    # Full names, not "all-linear": the weights decide which layers have a LoRA. Set afterwards:
    # LoraConfig would make a set of the names, and a set's order differs between processes.
    config.target_modules = sorted(layers)
    # Inner wrappers first; `from_peft` reads them in this order.
    inner_first = sorted(experts, key=lambda key: (_module(key[0]), -len(key[0])))
    config.target_parameters = [f"{_module(path)}.{name}" for path, name in inner_first] or None
    for (wrapper, _), matrices in experts.items():
        pairs = [matrices[e] for e in sorted(matrices)]
        a, b = torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
        layers[wrapper] = (a.flatten(0, 1), b.permute(1, 2, 0).flatten(1))
    return config, layers


def from_peft(config: LoraConfig, layers: dict[str, Factors]) -> Lora:
    """Undo `to_peft`. Raises ValueError if a layer's rank is not `config.r`."""
    wrapped: dict[str, str] = {}
    for name in reversed(config.target_parameters or []):
        wrapper, _, parameter = name.rpartition(".")
        while wrapper in wrapped:
            wrapper += ".base_layer"
        wrapped[wrapper] = parameter
    plain: dict[str, Factors] = {}
    for name, (a, b) in layers.items():
        if name in wrapped:
            all_a, all_b = a.unflatten(0, (-1, config.r)), b.unflatten(1, (config.r, -1))
            for e, matrix in enumerate(all_a):
                plain[f"{name}.{wrapped[name]}[{e}]"] = (matrix, all_b[:, :, e])
        elif a.shape[0] != config.r:
            raise ValueError(f"{name} is of rank {a.shape[0]}, not {config.r}")
        else:
            plain[name] = (a, b)
    # rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) divides by the root of the rank.
    return Lora(plain, config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r))


def write_peft(folder: Path, lora: Lora, base_model: str, fan_in_fan_out: bool = False) -> None:
    """Write `lora` as an ordinary PEFT folder (adapter_config.json, adapter_model.safetensors).

    fan_in_fan_out: the base layers' weights are [in, out], as in GPT-2's `Conv1D`.
    """
    config, layers = to_peft(lora)
    config.base_model_name_or_path = base_model
    config.fan_in_fan_out = fan_in_fan_out
    config.save_pretrained(str(folder))
    tensors = {
        f"{_PREFIX}{layer}{side}": factor.contiguous()
        for layer, factors in layers.items()
        for side, factor in zip((A, B), factors, strict=True)
    }
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


def read_peft(folder: Path) -> Lora:
    """Read a PEFT folder that holds a plain LoRA or rsLoRA, in float32.

    Raises InputError for anything else.
    """
    try:
        # Not `from_pretrained`: it would ask the hub for a file that is not there.
        fields = LoraConfig.from_json_file(str(folder / "adapter_config.json"))
        config = LoraConfig.from_peft_type(**fields)
        if not (folder / _WEIGHTS).exists():
            raise ValueError(f"there is no {_WEIGHTS}")
        tensors = load_file(folder / _WEIGHTS)
        if why := _not_plain(config, tensors):
            raise ValueError(f"it has {why}")
        names = sorted({key.rpartition(".lora_")[0] for key in tensors})
        layers = {
            name.removeprefix(_PREFIX): (tensors[name + A].float(), tensors[name + B].float())
            for name in names
        }
        return from_peft(config, layers)
    except Exception as error:
        raise InputError(
            f"{folder}: not a readable PEFT folder ({short(error)}); only plain LoRA is read, two "
            f"matrices per layer, from {_WEIGHTS}, never from a pickle"
        ) from error


def _not_plain(config: PeftConfig, tensors: Mapping[str, Tensor]) -> str:
    """What an adapter has that a plain LoRA has not, in its files' words; empty for a plain one."""
    if not isinstance(config, LoraConfig):
        return f"peft_type={PeftType(config.peft_type).value}"
    for name in _NOT_PLAIN:
        if value := getattr(config, name, None):
            return f"{name}={value}"
    if config.bias != "none":
        return f"bias={config.bias}"
    if config.init_lora_weights not in _BEGINNINGS:
        return f"init_lora_weights={config.init_lora_weights}"
    if not tensors:
        return "no weights"
    return min((key for key in tensors if not key.endswith((A, B))), default="")


def _module(wrapper: str) -> str:
    """The name of the module that a wrapper of PEFT stands for."""
    return wrapper.replace(".base_layer", "")

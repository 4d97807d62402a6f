"""Which layers of a model get a LoRA, by PEFT's choice; and how much of the model they are."""

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, TaskType, inject_adapter_in_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers.pytorch_utils import Conv1D

from tasks.errors import InputError, short
from tasks.lora.adapters import Factors

# PEFT warns of what it settles itself: how a Conv1D is stored, and the ranks of fused experts.
warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")

# A transformers model; its class differs from one checkpoint to the next.
AnyModel = Any
# PEFT's `target_modules`: "all-linear", a regular expression, or full names or their ends.
Names = Sequence[str] | str
# Layer -> (in, out).
Sizes = dict[str, tuple[int, int]]

# Kept per model: asking PEFT takes 60 ms for 28 layers, and every training job asks.
_KNOWN: WeakKeyDictionary[nn.Module, dict[str, Sizes]] = WeakKeyDictionary()
_REFUSED = "which cannot carry a LoRA here"
# Modules whose weights are not bare parameters.
_LAYERS = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def sizes_of(model: AnyModel, modules: Names, parameters: Sequence[str] = ()) -> Sizes:
    """The layers that PEFT puts a LoRA on, in name order.

    Matrices of bare parameters are named as in tasks/lora/adapters.py. modules, parameters: PEFT's
    `target_modules` and `target_parameters`. PEFT counts experts among "all-linear", and knows them
    by transformers 4's names. Raises InputError if PEFT finds nothing, or has no LoRA for it.
    """
    known = _KNOWN.setdefault(model, {})
    key = repr((modules, parameters))
    if key not in known:
        known[key] = _ask_peft(model, modules, parameters)
    return known[key]


def _ask_peft(model: nn.Module, modules: Names, parameters: Sequence[str]) -> Sizes:
    config = LoraConfig(
        target_modules=modules if isinstance(modules, str) else [*modules],
        target_parameters=[*parameters] or None,
        task_type=TaskType.CAUSAL_LM,
    )
    # A copy on the meta device: PEFT changes the model, and may stop half-way.
    memo: dict[int, Any] = {id(one): one.to("meta") for one in model.buffers()}
    memo |= {id(one): nn.Parameter(one.to("meta"), False) for one in model.parameters()}
    copied: Any = copy.deepcopy(model, memo)
    try:
        # Not by PEFT's low_cpu_mem_usage: it patches torch while other threads load a model.
        with torch.device("meta"):
            inject_adapter_in_model(config, copied)
    except NoMatchingPeftModuleError:
        raise InputError(
            f"target_modules {modules}: no linear layer of the model is so named"
        ) from None
    except ValueError as error:
        raise InputError(f"target_modules {modules}: PEFT says: {short(error)}") from None
    sizes: Sizes = {}
    for name, layer in sorted(copied.named_modules()):
        if isinstance(layer, LoraLayer):
            names = [name]
            if isinstance(layer, ParamWrapper):
                matrix = f"{name}.{layer.parameter_name}"
                names = [f"{matrix}[{number}]" for number in range(layer.num_experts)]
            sizes |= dict.fromkeys(names, (layer.in_features or 0, layer.out_features or 0))
    return sizes


def target_layers(model: AnyModel, target_modules: Names) -> Sizes:
    """The linear layers (`nn.Linear`, GPT-2's `Conv1D`) that PEFT chooses, in name order.

    Bare parameters are left out (`Coverage` names them). Raises InputError if PEFT chooses nothing
    else, or a layer of another kind, or the output embedding: its rows are picked positions, which
    do not lie user by user.
    """
    sizes = sizes_of(model, target_modules)
    layers = {name: size for name, size in sizes.items() if not name.endswith("]")}
    if not layers:
        raise InputError(
            f"target_modules {target_modules}: no linear layer of the model is so named, only bare "
            f"parameters ({min(sizes)}), {_REFUSED}"
        )
    for name in layers:
        if kind := _other_kind(model, model.get_submodule(name)):
            raise InputError(
                f"target_modules {target_modules}: {name} is {kind}, {_REFUSED}; leave it out"
            )
    return layers


def misfit(model: AnyModel, layers: Mapping[str, Factors]) -> str:
    """What of a LoRA does not fit the model, in words; empty if all of it fits."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, (a, b) in layers.items():
        if name not in modules:
            return f"the model has no layer {name}"
        if kind := _other_kind(model, modules[name]):
            return f"{name} is {kind}, {_REFUSED}"
        size, wanted = tuple(modules[name].weight.shape), (b.shape[0], a.shape[1])
        if (size[::-1] if isinstance(modules[name], Conv1D) else size) != wanted:
            return f"{name} is {size} in the model, the LoRA is for {wanted}"
    return ""


def _other_kind(model: AnyModel, layer: nn.Module) -> str:
    """What kind of layer this is, if it can get no LoRA; empty if it can."""
    if layer is model.get_output_embeddings():
        return "the output embedding"
    return "" if isinstance(layer, nn.Linear | Conv1D) else f"a {type(layer).__name__}"


@dataclass(frozen=True)
class Coverage:
    """`adapted` of the `linear` layers (all but the output embedding) have a LoRA.

    share: the adapted layers' part of all parameters (tied ones count once). bare: modules, such as
    experts, that hold matrices and are no layers: class -> (how many, their share).
    """

    adapted: int
    linear: int
    share: float
    bare: dict[str, tuple[int, float]]

    def text(self) -> str:
        """All of it in one line."""
        text = (
            f"a LoRA on {self.adapted} of {self.linear} linear layers, "
            f"{_percent(self.share)} of the parameters"
        )
        named = [f"{n} {name} ({_percent(share)})" for name, (n, share) in self.bare.items()]
        return f"{text}; none on the bare parameters of {', '.join(named)}" if named else text


def coverage(model: AnyModel, target_modules: Names) -> Coverage:
    """The coverage of a model, which may be on the meta device.

    Raises InputError as `target_layers` does.
    """

    def share(parameters: Iterable[nn.Parameter]) -> float:
        return sum(one.numel() for one in parameters) / total

    total: int = sum(one.numel() for one in model.parameters())
    adapted = [model.get_submodule(name) for name in target_layers(model, target_modules)]
    head, linear, bare = model.get_output_embeddings(), 0, dict[str, tuple[int, float]]()
    for module in model.modules():
        linear += isinstance(module, nn.Linear | Conv1D) and module is not head
        weights, name = list(module.parameters(recurse=False)), type(module).__name__
        if any(one.ndim > 1 for one in weights) and not isinstance(module, _LAYERS):
            count, before = bare.get(name, (0, 0.0))
            bare[name] = (count + 1, before + share(weights))
    bare = dict(sorted(bare.items(), key=lambda one: -one[1][1]))
    whole = share(one for layer in adapted for one in layer.parameters())
    return Coverage(len(adapted), linear, whole, bare)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "under 1%"

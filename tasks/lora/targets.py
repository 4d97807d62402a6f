"""Which layers of a model get a LoRA: PEFT's own choice."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from peft import LoraConfig, TaskType, inject_adapter_in_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from tasks.errors import InputError, short

# PEFT's remarks on what it settles itself: how a Conv1D is stored, and the ranks of fused experts.
warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")

# A transformers model; its class differs from one checkpoint to the next.
AnyModel = Any
# PEFT's `target_modules`: "all-linear", a regular expression, or full names or their ends.
Names = Sequence[str] | str
# Layer -> (in, out).
Sizes = dict[str, tuple[int, int]]

# Per model and targets: asking PEFT takes 60 ms for 28 layers, and every training job asks.
_KNOWN: WeakKeyDictionary[nn.Module, dict[str, Sizes]] = WeakKeyDictionary()


def sizes_of(
    model: AnyModel, target_modules: Names, target_parameters: Sequence[str] = ()
) -> Sizes:
    """The layers that PEFT puts a LoRA on, in name order; matrices as in tasks/lora/adapters.py.

    PEFT counts experts among "all-linear", and knows them by their names of transformers 4.
    Raises InputError where PEFT finds nothing, or something that it has no LoRA for.
    """
    known = _KNOWN.setdefault(model, {})
    key = repr((target_modules, target_parameters))
    if key not in known:
        config = LoraConfig(
            target_modules=target_modules if isinstance(target_modules, str) else [*target_modules],
            target_parameters=list(target_parameters) or None,
            task_type=TaskType.CAUSAL_LM,
        )
        known[key] = _ask_peft(model, config, f"target_modules {target_modules}")
    return known[key]


def _ask_peft(model: nn.Module, config: LoraConfig, option: str) -> Sizes:
    # A copy on the meta device: PEFT changes the model, and may stop half-way.
    memo: dict[int, Any] = {id(one): one.to("meta") for one in model.buffers()}
    memo |= {id(one): nn.Parameter(one.to("meta"), False) for one in model.parameters()}
    bare: Any = copy.deepcopy(model, memo)
    try:
        inject_adapter_in_model(config, bare, low_cpu_mem_usage=True)
    except NoMatchingPeftModuleError:
        raise InputError(f"{option}: no linear layer of the model is so named") from None
    except ValueError as error:
        raise InputError(f"{option}: PEFT says: {short(error)}") from None
    sizes: Sizes = {}
    for name, layer in sorted(bare.named_modules()):
        if isinstance(layer, LoraLayer):
            names = [name]
            if isinstance(layer, ParamWrapper):
                matrix = f"{name}.{layer.parameter_name}"
                names = [f"{matrix}[{number}]" for number in range(layer.num_experts)]
            sizes |= dict.fromkeys(names, (layer.in_features or 0, layer.out_features or 0))
    return sizes

"""One forward pass of packed rows: losses of the answers only, per label.

The output embedding sees the label positions and nothing else: a hook in front of it picks them,
so models that scale or cap their logits after it still do.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tasks.lora.base import Base
from tasks.lora.packing import Packed


def label_losses(base: Base, packed: Packed) -> Tensor:
    """-log p of each label [N] (at least float32), with the model's grouped layers as they are."""
    model = base.model
    head = model.get_output_embeddings()

    def pick(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        return (hidden.reshape(-1, hidden.shape[-1])[packed.where][None],)

    options: dict[str, Any] = {}
    if not packed.one_per_row:
        additive = model.config._attn_implementation != "sdpa"
        options["attention_mask"] = packed.mask(model.dtype, additive)
        options["position_ids"] = packed.position_ids
    hook = head.register_forward_pre_hook(pick)
    try:
        logits = model(input_ids=packed.input_ids, use_cache=False, **options).logits[0]
    finally:
        hook.remove()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(wide, packed.label, reduction="none")


def may_pack(model: Any) -> bool:
    """Whether several samples may share a row: the model takes our mask and positions as they are.

    Layers that see a window only, and models without position ids (ALiBi, recurrent ones), make
    masks of their own, which know nothing of several samples in a row.
    """
    config = model.config.get_text_config()
    windowed = getattr(config, "sliding_window", None) or getattr(config, "layer_types", None)
    if windowed and set(getattr(config, "layer_types", None) or ["sliding"]) != {"full_attention"}:
        return False
    return "position_ids" in inspect.signature(model.forward).parameters


def sum_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums of `values` [N] by `index` [N] into [size]."""
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_add_(0, index, values)

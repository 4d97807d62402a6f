"""One forward pass of packed rows: the loss of each label.

The output embedding sees the labels' positions only. A hook in front of it picks them, so a model
that scales or caps its logits still does. In KNOWN_LAYERS the last layer, too, sees only these
positions after its attention. That saves most of the layer's arithmetic.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tasks.lora.base import Base
from tasks.lora.batches import Encoded, takes
from tasks.lora.kernels import KNOWN_LAYERS
from tasks.lora.packing import ONE_PER_ROW, ONE_PER_USER, Packed, layout


def label_losses(base: Base, packed: Packed) -> Tensor:
    """-log p of each label [N] (at least float32), with the LoRAs that the layers now have."""
    model = base.model
    options: dict[str, Any] = {}
    if not packed.one_per_row:
        options["position_ids"] = packed.position_ids
        if packed.longest:
            options |= {"cu_seq_lens_q": packed.ends, "max_length_q": packed.longest}
            # Of four dimensions, so transformers takes it for a finished mask. Nobody reads it.
            options["attention_mask"] = packed.ends[None, None, None]
        else:
            options["attention_mask"] = packed.mask(model.dtype)
    with _labels_only(model, packed):
        logits = model(input_ids=packed.input_ids, use_cache=False, **options).logits[0]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(wide, packed.label, reduction="none")


@contextmanager
def _labels_only(model: Any, packed: Packed) -> Iterator[None]:
    """After the last layer's attention only the labels' positions are computed.

    The rest of that layer works position by position. If the layer is unknown, or runs again in the
    backward pass, the positions are picked in front of the output embedding.
    """
    layer = last_layer(model)
    source = packed.source if layer is None else packed.slot

    def pick(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].flatten(0, -2)[source][None],)

    def picked(x: Tensor) -> Tensor:
        """[U * n, T, d] to [U, M, d]: still user-major, as grouped layers want it."""
        flat = x.flatten(0, -2)
        return flat.index_select(0, packed.picks.view(-1)).view(*packed.picks.shape, -1)

    def forward(hidden_states: Tensor, **options: Any) -> Tensor:
        normed = layer.input_layernorm(hidden_states)
        attended = layer.self_attn(hidden_states=normed, **options)[0]
        x = picked(hidden_states) + attended
        out: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
        return out

    with ExitStack() as stack:
        stack.enter_context(model.get_output_embeddings().register_forward_pre_hook(pick))
        if layer is not None:
            attention = layer.self_attn.o_proj
            stack.enter_context(attention.register_forward_pre_hook(lambda _, x: (picked(x[0]),)))
            layer.forward = forward
            stack.callback(delattr, layer, "forward")
        yield


def last_layer(model: Any) -> Any:
    """The last decoder layer, if `_labels_only` knows its forward pass."""
    layers = getattr(model.base_model, "layers", None)
    # In this order: `is_gradient_checkpointing` looks at every module.
    if not layers or (model.training and model.is_gradient_checkpointing):
        return None
    last = layers[model.config.get_text_config().num_hidden_layers - 1]
    return last if type(last).__name__ in KNOWN_LAYERS else None


def row_limit(base: Base, per_user: Iterable[Sequence[Encoded]]) -> int:
    """The row limit for these users' samples: ONE_PER_ROW if the model can take no other.

    ONE_PER_USER if attention takes samples end to end without a mask; else by `layout`.
    """
    if not may_pack(base.model):
        return ONE_PER_ROW
    samples = [*per_user]
    if base.end_to_end and not any(one.choices for of_user in samples for one in of_user):
        return ONE_PER_USER
    return layout(samples)


def may_pack(model: Any) -> bool:
    """Whether several samples may share a row: the model takes our mask and positions as they are.

    Layers with a window do not, nor do models without position ids (ALiBi, recurrent ones).
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds and getattr(config, "sliding_window", None):
        return False
    return kinds <= {"full_attention"} and takes(model, "position_ids")


def sum_by(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums of `values` [N] by `index` [N] into [size]."""
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_add_(0, index, values)

"""Torch's own kernels in a model of transformers, on a GPU in half precision.

Attention over samples that lie end to end in rows. A dense mask keeps attention out of its fast
kernels, and its cost grows with the square of a row. The kernel for unequal lengths needs no mask,
so a row may hold all of a user's samples. The model gets the samples' ends under the names that
transformers' flash attention has for them (`cu_seq_lens_q`, `max_length_q`).

Norms. transformers writes them out in float32: six passes over the states forward, and twice as
many backward. Torch's norm is fused.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Layers that are x + attention(norm(x)), then x + mlp(norm(x)). Their parts have transformers 5's
# names. Their attention is softmax(q k^T) v and nothing more, and gets all the model's arguments.
KNOWN_LAYERS = (
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
)
# Norms that compute weight * x / rms(x), with the weight as it is (others add 1 to it).
_KNOWN_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
# What transformers calls `attention`, beside its "sdpa" and "eager".
NAME = "end_to_end"


def use_kernels(model: Any) -> bool:
    """Put in the kernels that fit model and GPU. Returns whether it takes samples end to end."""
    if model.device.type != "cuda" or model.dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.cuda.get_device_capability(model.device) < (8, 0):
        return False
    # cuDNN's attention makes a plan for every new shape, which takes .4 s (H200).
    torch.backends.cuda.enable_cudnn_sdp(False)
    fuse_norms(model)
    return use_varlen(model)


def fuse_norms(model: Any) -> None:
    """Put torch's norm in the place of each of `_KNOWN_NORMS`, with the same weight."""
    for name, norm in [*model.named_modules()]:
        if type(norm).__name__ in _KNOWN_NORMS:
            one = nn.RMSNorm(norm.weight.shape[0], norm.variance_epsilon, device="meta")
            one.weight = norm.weight
            model.set_submodule(name, one.train(norm.training))


def use_varlen(model: Any) -> bool:
    """Let a model take samples end to end if the kernel suits all its layers. Returns whether."""
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = {type(layer).__name__ for layer in getattr(model.base_model, "layers", ())}
    known = bool(kinds) and kinds <= {*KNOWN_LAYERS} and size % 8 == 0 and size <= 256
    if known:
        model.set_attn_implementation(NAME)
    return known


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """[B, heads, T, d] to [B, T, heads, d]: causal, each sample by itself.

    cu_seq_lens_q [S + 1] int32: 0, then the end of each sample in [B * T]. Without it this is sdpa.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    groups = query.shape[1] // key.shape[1]
    heads = (query, repeat_kv(key, groups), repeat_kv(value, groups))
    q, k, v = (one.transpose(1, 2).flatten(0, 1) for one in heads)
    ends, most = cu_seq_lens_q, max_length_q
    # A window to the left only: causal.
    out = varlen.varlen_attn(q, k, v, ends, ends, most, most, scale=scaling, window_size=(-1, 0))
    return cast(Tensor, out).unflatten(0, (len(query), -1)), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

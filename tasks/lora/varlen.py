"""Attention over samples that lie end to end in rows, by torch's kernel for unequal lengths.

On a GPU in half precision. A dense mask keeps attention there out of its fast kernels, and its cost
grows with the square of a row; here a row may be as long as all of a user's samples. Where they end
is given to the model as to transformers' own flash attention (`cu_seq_lens_q`, `max_length_q`).
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# How transformers calls it: an implementation of attention, beside "sdpa" and "eager".
NAME = "end_to_end"


def use(model: Any) -> None:
    """Let a model take samples end to end, where torch's kernel knows all of its attention."""
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    more = ("attn_logit_softcapping", "v_head_dim")
    if size % 8 == 0 and size <= 256 and not any(getattr(config, one, None) for one in more):
        model.set_attn_implementation(NAME)


def used(model: Any) -> bool:
    """Whether the model takes samples end to end."""
    return bool(model.config._attn_implementation == NAME)


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
    """[B, heads, T, d] to [B, T, heads, d]: each sample by itself, causal, or as sdpa.

    cu_seq_lens_q [S + 1] int32: from 0 on, where in [B * T] samples end. Without it, sdpa.
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

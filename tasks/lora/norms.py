"""A model's norms by torch's own kernel, on a GPU in half precision.

transformers writes them out in float32: six passes over the states forward, and twice as many back.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# Those that compute weight * x / rms(x), with the weight as it is (transformers 5).
_KNOWN = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def fuse(model: Any) -> None:
    """Put torch's norm in the place of each that computes the same, with the same weight."""
    for name, norm in [*model.named_modules()]:
        if type(norm).__name__ in _KNOWN:
            one = nn.RMSNorm(norm.weight.shape[0], norm.variance_epsilon, device="meta")
            one.weight = norm.weight
            model.set_submodule(name, one.train(norm.training))

"""Merging anchors' LoRAs into one (arXiv 2511.20072, adaptive fusion).

With anchors i, weights w_i and the anchors' common scale s, the merged update of a layer is

* `exact`:   s * sum_i w_i B_i A_i, as a concatenation of rank m * r (nothing is lost);
* `factors`: s * (sum_i w_i B_i)(sum_i w_i A_i), the published way; has cross terms;
* `svd`:     the best rank-r approximation of `exact` in the Frobenius norm (Eckart-Young).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tasks.lora.adapters import Lora

MERGES = ("exact", "factors", "svd")


def merge(loras: Sequence[Lora], weights: Sequence[float], how: str) -> Lora:
    """The merged LoRA of `loras` with `weights` (same length, any real numbers).

    Raises ValueError when lengths, scales or layers differ, or `how` is not one of MERGES.
    """
    if how not in MERGES:
        raise ValueError(f"merge must be one of {MERGES}, got {how!r}")
    if not loras or len(loras) != len(weights):
        raise ValueError(f"merge needs one weight per LoRA, got {len(loras)} and {len(weights)}")
    first = loras[0]
    for lora in loras[1:]:
        if lora.scale != first.scale or lora.layers.keys() != first.layers.keys():
            raise ValueError("merge needs LoRAs of the same scale and layers")
    layers = {}
    for name in first.layers:
        a = [lora.layers[name][0] for lora in loras]
        b = [lora.layers[name][1] for lora in loras]
        if how == "factors":
            layers[name] = (_weighted(a, weights), _weighted(b, weights))
            continue
        pair = torch.cat(a, 0), torch.cat([w * x for w, x in zip(weights, b, strict=True)], 1)
        layers[name] = _truncate(*pair, rank=first.rank) if how == "svd" else pair
    return Lora(layers, first.scale)


def concatenate(under: Lora, over: Lora) -> Lora:
    """One LoRA whose update is the sum of both: ranks add up, scales move into B, scale 1.

    A layer that only one of them has gets zeros for the other, so that all ranks stay equal.
    """
    layers = {}
    for name in sorted({*under.layers, *over.layers}):
        have = under.layers.get(name) or over.layers[name]
        none = (have[0][:0], have[1][:, :0])
        parts = []
        for lora in (under, over):
            a, b = lora.layers.get(name, none)
            missing = lora.rank - a.shape[0]
            a = torch.cat([a, a.new_zeros(missing, a.shape[1])], 0)
            b = torch.cat([b, b.new_zeros(b.shape[0], missing)], 1)
            parts.append((a, lora.scale * b))
        layers[name] = (torch.cat([a for a, _ in parts], 0), torch.cat([b for _, b in parts], 1))
    return Lora(layers, 1.0)


def merged_rank(rank: int, members: int, how: str) -> int:
    """Rank of the merged LoRA of `members` anchors of rank `rank`."""
    return rank * members if how == "exact" else rank


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([w * x for w, x in zip(weights, tensors, strict=True)]).sum(0)


def _truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` factors of `b @ a` without forming it: SVD between two thin QRs."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    left = b.new_zeros(b.shape[0], rank)
    right = a.new_zeros(rank, a.shape[1])
    # Where a layer is narrower than the rank there are fewer singular values; the rest stay 0.
    left[:, : len(root)] = q_b @ (u[:, :rank] * root)
    right[: len(root)] = (root[:, None] * vt[:rank]) @ q_a.T
    return right, left

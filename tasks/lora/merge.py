"""Merging anchors' LoRAs (arXiv 2511.20072, adaptive fusion), for one user or many at once.

With anchors i, weights w_i and the anchors' common scale s, the merged update of a layer is

* `exact`:   s * sum_i w_i B_i A_i, as a concatenation of rank m * r (nothing is lost);
* `factors`: s * (sum_i w_i B_i)(sum_i w_i A_i), the published way; has cross terms;
* `svd`:     the best rank-r approximation of `exact` in the Frobenius norm (Eckart-Young).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from tasks.lora.adapters import Factors, Lora, LoraBatch
from tasks.lora.bank import Bank, stack
from tasks.lora.targets import AnyModel, Sizes

# Merged LoRAs of all users are kept in memory if they take no more.
KEPT_BYTES = 2**28


def merge(loras: Sequence[Lora], weights: Sequence[float], how: str) -> Lora:
    """The merged LoRA of `loras` with `weights` (same length, any real numbers).

    Raises ValueError if lengths, scales, ranks or layers differ.
    """
    if len(loras) != len(weights):
        raise ValueError(f"merge needs one weight per LoRA, got {len(loras)} and {len(weights)}")
    members = [str(number) for number in range(len(loras))]
    device = next(iter(loras[0].layers.values()))[0].device
    users = MergedUsers(stack(members, loras), [(members, weights)], how, device)
    return users.parts([0]).one(0)


class MergedUsers:
    """The merged LoRAs of many users, made from their recipes when a batch needs them."""

    def __init__(
        self,
        bank: Bank,
        recipes: Sequence[tuple[Sequence[str], Sequence[float]]],
        how: str,
        device: torch.device,
    ) -> None:
        """`recipes`: per user the anchors and their weights, equally many for all users."""
        number = {member: k for k, member in enumerate(bank.ids)}
        members = [[number[anchor] for anchor in anchors] for anchors, _ in recipes]
        self.members = torch.tensor(members, device=device)
        weights = [list(weights) for _, weights in recipes]
        self.weights = torch.tensor(weights, dtype=torch.float64, device=device)
        self.bank, self.how = bank.to(device), how
        self.layers = self.bank.layers
        # Every training step asks for some: what is small, or slow to compute, is kept.
        members_of = self.members.shape[1] if how == "exact" else 1
        numbers = sum(a[0].numel() + b[0].numel() for a, b in self.layers.values())
        small = 4 * numbers * members_of * len(recipes) <= KEPT_BYTES
        keep = small or how == "svd"
        self.kept = self.weighed(range(len(recipes)), self.weights) if keep else None

    def parts(self, users: Sequence[int]) -> LoraBatch:
        """The merged LoRAs of `users` (their numbers), gathered on the device."""
        if self.kept:
            return self.kept.of(users)
        rows = torch.tensor([*users]).to(self.weights.device, non_blocking=True)
        return self.weighed(users, self.weights[rows])

    def weighed(self, users: Sequence[int], weights: Tensor) -> LoraBatch:
        """As `parts`, with other weights [U, m] of the same anchors; differentiable in them."""
        members = self.members[torch.tensor([*users]).to(self.members.device, non_blocking=True)]
        layers = {
            name: _merge_layer(a[members], b[members], weights.to(a.dtype), self.how)
            for name, (a, b) in self.layers.items()
        }
        return LoraBatch(layers, self.bank.scale)


def concatenate(under: Lora, over: Lora) -> Lora:
    """One LoRA whose update is the sum of both: ranks add up, scales move into B.

    A layer that one of them lacks gets zeros for it, so that all ranks are equal.
    """
    below, above = (_widened(lora, _all_sizes([under, over]), lora.rank) for lora in (under, over))
    layers = {
        name: (torch.cat([a, above[name][0]], 0), torch.cat([b, above[name][1]], 1))
        for name, (a, b) in below.items()
    }
    return Lora(layers, 1.0)


def alike(loras: Sequence[Lora]) -> list[Lora]:
    """The same updates with one scale, one rank and the same layers, as a bank has them.

    Ranks are filled up with zeros. A layer that one lacks is zeros. Scales move into B.
    """
    sizes, rank = _all_sizes(loras), max(lora.rank for lora in loras)
    return [Lora(_widened(lora, sizes, rank), 1.0) for lora in loras]


def cut(lora: Lora, rank: int) -> tuple[Lora, float]:
    """The best LoRA of at most this rank (Eckart-Young), and its relative error.

    The error is ||W - W_r|| / ||W|| of the updates, in the Frobenius norm over all layers.
    """
    if lora.rank <= rank:
        return lora, 0.0
    layers, whole, lost = {}, 0.0, 0.0
    for name, (a, b) in lora.layers.items():
        small_a, small_b, values = _truncate(a[None], lora.scale * b.double()[None], rank)
        layers[name] = (small_a[0].to(a.dtype), small_b[0].to(b.dtype))
        energies = values[0].square()
        whole, lost = whole + float(energies.sum()), lost + float(energies[rank:].sum())
    return Lora(layers, 1.0), (lost / whole) ** 0.5 if whole else 0.0


@torch.no_grad()
def add_to_model(model: AnyModel, lora: Lora) -> None:
    """Add the LoRA's update to the model's weights: W + s B A, in float32, then rounded."""
    for name, (a, b) in lora.layers.items():
        layer = model.get_submodule(name)
        update = lora.scale * (b.float() @ a.float()).to(layer.weight.device)
        update = update.T if isinstance(layer, Conv1D) else update
        layer.weight.copy_(layer.weight.float() + update)


def _all_sizes(loras: Sequence[Lora]) -> Sizes:
    """(in, out) of every layer of any of the LoRAs, in name order."""
    return dict(sorted({name: size for lora in loras for name, size in lora.sizes.items()}.items()))


def _widened(lora: Lora, sizes: Sizes, rank: int) -> dict[str, Factors]:
    """A and B of all layers of `sizes` at this rank, the scale in B; zeros for a missing layer."""
    some, layers = next(iter(lora.layers.values()))[0], {}
    for name, (fan_in, fan_out) in sizes.items():
        nothing = some.new_zeros(0, fan_in), some.new_zeros(fan_out, 0)
        a, b = lora.layers.get(name, nothing)
        missing = rank - len(a)
        layers[name] = (pad(a, (0, 0, 0, missing)), lora.scale * pad(b, (0, missing)))
    return layers


def _merge_layer(a: Tensor, b: Tensor, weights: Tensor, how: str) -> Factors:
    """`a` [U, m, r, in], `b` [U, m, out, r], `weights` [U, m] to A [U, R, in], B [U, out, R]."""
    if how == "factors":
        return torch.einsum("um,umri->uri", weights, a), torch.einsum("um,umor->uor", weights, b)
    wide_a = a.flatten(1, 2)
    wide_b = (weights[:, :, None, None] * b).transpose(1, 2).flatten(2)
    return _truncate(wide_a, wide_b, a.shape[2])[:2] if how == "svd" else (wide_a, wide_b)


def _truncate(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best factors A, B of this rank of each `b @ a`, and the singular values of `b @ a`.

    By an SVD between two thin QRs.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    u, s, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = s[:, :rank].sqrt()
    left = b.new_zeros(len(b), b.shape[1], rank)
    right = a.new_zeros(len(a), rank, a.shape[2])
    # A layer narrower than the rank has fewer singular values; the rest stay 0.
    count = root.shape[1]
    left[:, :, :count] = q_b @ (u[:, :, :rank] * root[:, None])
    right[:, :count] = (root[:, :, None] * vt[:, :rank]) @ q_a.mT
    return right, left, s

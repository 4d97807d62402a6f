"""Many users' LoRAs over one frozen base, in one forward pass.

Rows of a batch are user-major: [U * n, T, d], n rows per user. The base weight W is shared, in one
product; each user's LoRA is a slice of a batched product on the same rows as [U, n * T, d]:

    y = x W^T + bias + s_f (x A_f^T) B_f^T + s (x A^T) B^T

with a frozen part A_f [U, R, in], B_f [U, out, R] of scale s_f (the merged LoRA) and a trained part
A [U, r, in], B [U, out, r] of scale s. Either part may be absent. (LoRA: Hu et al. 2021, equation
3. S-LoRA and Punica serve LoRAs in such batches; here they are trained so.)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from tasks.lora.adapters import Factors, Lora, LoraBatch, Part
from tasks.lora.targets import AnyModel, Names, Sizes, target_layers

# In half precision ranks are filled up with zeros to a multiple of this. A GPU's kernels are faster
# with rows of 16 bytes (x A^T, x of 16,384 x 2,048, H200: .049 ms for rank 20, .036 for 24).
ALIGNED = 8
_HALF = (torch.bfloat16, torch.float16)


class GroupedLinear(nn.Module):
    """A frozen linear layer with a frozen and a trained LoRA per user."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.trained: Part | None = None
        # Both parts side by side, scales in B: A [U, R + r, in], B [U, out, R + r], trained last.
        self.joined: Factors | None = None

    @property
    def weight(self) -> Tensor:
        """The base weight: some models look at it."""
        return cast(Tensor, self.linear.weight)

    def set(
        self, frozen: Part | None, trained: Part | None, dtype: torch.dtype | None = None
    ) -> None:
        """Set the LoRAs of the users whose rows come next; without any it is the base layer.

        dtype: of the products; the LoRAs' gradients are rounded to it. None: the LoRAs' own.
        """
        joined = None
        if parts := [part for part in (frozen, trained) if part]:
            if short := -sum(a.shape[1] for a, _, _ in parts) % ALIGNED if dtype in _HALF else 0:
                a, b, _ = parts[0]
                nothing = (a.new_zeros(len(a), short, a.shape[2]), b.new_zeros(*b.shape[:2], short))
                parts.insert(0, (*nothing, 1.0))
            with torch.no_grad():
                joined = (
                    torch.cat([a for a, _, _ in parts], 1).to(dtype),
                    torch.cat([scale * b for _, b, scale in parts], 2).to(dtype),
                )
        # Not by attribute: nn.Module's `__setattr__` is slow, and every step sets every layer.
        vars(self).update(trained=trained, joined=joined)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [U * n, T, in] (or [U, in]) to [U * n, T, out], with the LoRAs of `set`."""
        if self.joined is None:
            return cast(Tensor, self.linear(x))
        weight, bias, y = None, None, None
        if type(self.linear) is nn.Linear:
            weight, bias = self.linear.weight, self.linear.bias
        else:
            y = self.linear(x)  # `Conv1D`, or in 4 bits: by its own forward and gradient
        a, b, scale = self.trained or (None, None, 1.0)
        # torch gives `apply` no types.
        apply = cast("Callable[..., Tensor]", _Product.apply)
        return apply(x, y, weight, bias, a, b, scale, *self.joined)


Layers = dict[str, GroupedLinear]


class _Product(torch.autograd.Function):
    """The layer's sum with its gradient written out: one node instead of a dozen.

    With A and B of both parts side by side and G the gradient of the output: dx = G W + (G B) A;
    of the trained part dA = (G B)^T x, dB = s G^T (x A^T).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
        wide_a: Tensor,
        wide_b: Tensor,
    ) -> Tensor:
        low = torch.bmm(_by_user(x, wide_a).to(wide_a.dtype), wide_a.transpose(1, 2))
        up = wide_b.transpose(1, 2)
        # Nobody else holds `out`, so the update may be added in place.
        out = linear(x, weight, bias) if weight is not None else cast(Tensor, y).clone()
        rows = _by_user(out, wide_a)
        if rows.dtype == low.dtype:
            rows.baddbmm_(low, up)
        else:
            # A bfloat16 base: the sum is made in the LoRAs' float32, as in PEFT, then rounded.
            rows.copy_(rows + torch.bmm(low, up))
        rank = 0 if a is None else a.shape[1]
        # Backward needs the trained columns alone. In half precision all columns are faster.
        ctx.first = 0 if low.dtype in _HALF else low.shape[2] - rank
        ctx.rank, ctx.scale = rank, scale
        ctx.save_for_backward(x, weight, low[:, :, ctx.first :], wide_a, wide_b)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, low, wide_a, wide_b = ctx.saved_tensors
        rows = _by_user(gradient, wide_b).to(wide_b.dtype)
        through_b = torch.bmm(rows, wide_b)
        of_x = of_a = of_b = None
        if ctx.needs_input_grad[0]:
            if weight is None:
                of_x = torch.bmm(through_b, wide_a).to(x.dtype).view_as(x)
            else:
                of_x = gradient @ weight
                inner = _by_user(of_x, wide_a)
                if inner.dtype == wide_a.dtype:
                    inner.baddbmm_(through_b, wide_a)
                else:
                    inner.add_(torch.bmm(through_b, wide_a).to(inner.dtype))
        if ctx.rank:
            # A needs none if the weights of an exact merge are trained: they are in B alone.
            if ctx.needs_input_grad[4]:
                inputs = _by_user(x, wide_a).to(wide_a.dtype)
                columns = through_b[:, :, ctx.first :]
                of_a = torch.bmm(columns.transpose(1, 2), inputs)[:, -ctx.rank :]
            of_b = torch.bmm(rows.transpose(1, 2), low)[:, :, -ctx.rank :].mul_(ctx.scale)
        of_y = gradient if ctx.needs_input_grad[1] else None
        return of_x, of_y, None, None, of_a, of_b, None, None, None


def _by_user(x: Tensor, factor: Tensor) -> Tensor:
    """Rows of `x` as [U, N, d]: a view if `x` is contiguous, as it is if it is written to."""
    return x.reshape(factor.shape[0], -1, x.shape[-1])


@contextmanager
def grouped(model: nn.Module, names: Sequence[str]) -> Iterator[Layers]:
    """`model` with the named linear layers replaced by grouped ones; put back at the end."""
    layers = {name: GroupedLinear(model.get_submodule(name)) for name in names}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield layers
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer.linear)


@contextmanager
def assigned(
    layers: Layers,
    frozen: LoraBatch | None,
    trained: LoraBatch | None,
    dtype: torch.dtype | None = None,
) -> Iterator[None]:
    """`layers` with the LoRAs of the users whose rows come next; without LoRAs at the end.

    dtype: as `GroupedLinear.set` takes it. Raises ValueError for a LoRA on an ungrouped layer.
    """
    both = (frozen, trained)
    if lost := {name for one in both if one for name in one.layers} - layers.keys():
        raise ValueError(f"{min(lost)} has a LoRA but is not grouped")
    try:
        for name, layer in layers.items():
            below, above = (one.part(name) if one else None for one in both)
            layer.set(below, above, dtype)
        yield
    finally:
        for layer in layers.values():
            layer.set(None, None)


@dataclass(frozen=True)
class Shapes:
    """(in, out) of a LoRA's layers, and the places of its factors in one flat row.

    All numbers of a user are one row of a matrix [U, P]. So norms, clipping and AdamW per user take
    a few operations, however many layers there are.
    """

    sizes: Sizes
    rank: int

    @property
    def width(self) -> int:
        """P, the numbers of one user."""
        return sum(self.rank * (fan_in + fan_out) for fan_in, fan_out in self.sizes.values())

    def split(self, flat: Tensor) -> dict[str, Factors]:
        """Views of `flat` [U, P] per layer: A [U, r, in], B [U, out, r]."""
        users, widths = len(flat), [self.rank * one for pair in self.sizes.values() for one in pair]
        parts = iter(flat.split(widths, 1))
        return {
            name: (next(parts).view(users, self.rank, i), next(parts).view(users, o, self.rank))
            for name, (i, o) in self.sizes.items()
        }

    def loras(self, flat: Tensor, scale: float) -> list[Lora]:
        """Each user's row of `flat` [U, P] as a LoRA."""
        loras = LoraBatch(self.split(flat), scale)
        return [loras.one(user) for user in range(len(flat))]

    def join(self, loras: Sequence[Lora]) -> Tensor:
        """The rows [U, P] of LoRAs of these shapes: undoes `loras`."""
        rows = [[one.flatten() for name in self.sizes for one in lora.layers[name]]
                for lora in loras]  # fmt: skip
        return torch.stack([torch.cat(row) for row in rows])


def shapes_of(model: AnyModel, target_modules: Names, rank: int) -> Shapes:
    """The shapes of a LoRA on `target_layers`."""
    return Shapes(target_layers(model, target_modules), rank)


def fresh(shapes: Shapes, seeds: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Initial weights [U, P] of one LoRA per seed: A uniform in +-1/sqrt(in), B zero.

    That is PEFT's default (Kaiming with a = sqrt 5). Each user's numbers depend on one seed alone.
    """
    flat = torch.zeros(len(seeds), shapes.width, dtype=dtype)
    for row, seed in zip(flat, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        for a, _ in shapes.split(row[None]).values():
            bound = 1.0 / math.sqrt(a.shape[2])
            uniform = torch.rand(a.shape[1:], generator=generator, dtype=torch.float32)
            a.copy_((uniform * 2 - 1) * bound)
    return flat

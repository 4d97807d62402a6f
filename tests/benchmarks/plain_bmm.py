"""The engine's opponent (c): many users at once the plain way, without what makes the engine fast.

Per-user LoRAs as batched products under ordinary autograd, the merged and the stacked part each on
its own; all samples of a step in one batch, padded to the longest of them; logits everywhere;
`torch.optim.AdamW` on one stacked parameter pair per layer. It gives the engine's numbers
(`tests/unit/lora/test_plain_bmm.py`), so it is a second implementation to compare with, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import get_scheduler

from tasks.lora.adapters import LoraBatch, Part
from tasks.lora.batches import Encoded
from tasks.lora.grouped import Shapes
from tasks.lora.train import Training, epochs
from tests.benchmarks.opponents import padded

IGNORED = -100


class PlainBmm(nn.Module):
    """x [U * n, T, in] to [U * n, T, out]: a frozen layer, and each user's LoRAs added to it."""

    def __init__(self, layer: nn.Module, under: Part | None, a: Tensor, b: Tensor, scale: float):
        super().__init__()
        self.layer, self.under, self.scale = layer, under, scale
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        rows = x.reshape(len(self.a), -1, x.shape[-1]).to(self.a.dtype)
        added = self.scale * (rows @ self.a.mT @ self.b.mT)
        if self.under is not None:
            a, b, scale = self.under
            added = added + scale * (rows @ a.mT @ b.mT)
        return (y + added.view_as(y)).to(y.dtype)


def train_plain(
    model: Any,
    users: Sequence[Sequence[Encoded]],
    options: Training,
    seeds: Sequence[int],
    shapes: Shapes,
    initial: Tensor,
    scale: float,
    under: LoraBatch | None,
    pad: int,
) -> Tensor:
    """The trained weights [U, P] (`Shapes`) of users with equally many samples, from `initial`.

    Raises ValueError when users have more or fewer samples: their steps would not be the same.
    """
    if len({len(own) for own in users}) != 1:
        raise ValueError("users must have equally many samples")
    plans = [list(epochs(len(users[0]), options, seed)) for seed in seeds]
    names = list(shapes.sizes)
    placed = {
        name: PlainBmm(model.get_submodule(name), under and under.part(name), a, b, scale)
        for name, (a, b) in shapes.split(initial).items()
    }
    parameters = [p for layer in placed.values() for p in (layer.a, layer.b)]
    steps = len(plans[0])
    optimizer = torch.optim.AdamW(
        parameters, lr=options.learning_rate, weight_decay=options.weight_decay
    )
    warmup = math.ceil(options.warmup_share * steps)
    schedule = get_scheduler(options.schedule, optimizer, warmup, steps)
    try:
        for name in names:
            model.set_submodule(name, placed[name])
        for step in range(steps):
            chosen = [
                own[i]
                for own, plan in zip(users, plans, strict=True)
                for micro in plan[step]
                for i in micro
            ]
            _losses(model, chosen, len(users), pad).sum().backward()
            squares = [p.grad.flatten(1).square().sum(1) for p in parameters]
            norms = torch.stack(squares).sum(0).sqrt()
            clip = (options.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
            for parameter in parameters:
                parameter.grad.mul_(clip[:, None, None])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    finally:
        for name in names:
            model.set_submodule(name, placed[name].layer)
    return torch.cat([parameter.detach().flatten(1) for parameter in parameters], 1)


def _losses(model: Any, samples: Sequence[Encoded], users: int, pad: int) -> Tensor:
    """[U]: each user's mean loss over the answer tokens of `samples`, which are user-major."""
    batch = {name: value.to(model.device) for name, value in padded(samples, pad).items()}
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(users, -1).sum(1) / (labels != IGNORED).view(users, -1).sum(1)


def users_that_fit(config: Any, users: Sequence[Sequence[Encoded]], options: Training) -> int:
    """How many of `users` may share a step on a CPU: half of what memory is free, by an estimate.

    Too many would not raise there but end the process. The estimate counts, in float32 and per
    position, the logits four times and what autograd keeps of each layer.
    """
    kept = config.num_hidden_layers * (24 * config.hidden_size + 8 * config.intermediate_size)
    longest = max(len(s.prompt) + len(s.answer) for own in users for s in own)
    positions = longest * options.batch_size * options.accumulation
    each = 4 * positions * (kept + 4 * config.vocab_size)
    return max(1, min(len(users), psutil.virtual_memory().available // 2 // each))

"""A user's LoRA, assembled from pieces of the anchors' LoRAs layer by layer, without training.

The idea of Per-Pcs (arXiv 2406.10471). A piece is an anchor's A and B of one layer. Each has a gate
g [in], trained on the anchor's items with the LoRA frozen:

    y = W x + scale * sigmoid(g . x) B A x

A user's items go through the base model once. h [in] is the mean over all their tokens of what
enters a layer. The user gets the layer's `top_m` pieces of the largest g . h, weighed by the
softmax of these g . h.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING

from pydantic import Field

from tasks.methods.method import WITHOUT_EVIDENCE, Method
from tasks.model import Made, loaded_model
from tasks.record import File, Options, Result, key_of, library_versions
from tasks.results.models import Bank, Merged, Prepared, Setting, Training
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.stacking import Adapted, Batch
from tasks.text.loading import LIBRARIES
from tasks.text.questions import content
from tasks.users import users_in_order

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.config.task import MethodConfig
    from tasks.lora.adapters import Lora
    from tasks.lora.bank import Bank as LoadedBank
    from tasks.lora.base import Base
    from tasks.lora.batches import Encoded

FILE = "gates.safetensors"
# Bytes that a user stores per piece: its number and weight.
PIECE = 2 + 4
# Layer -> gates [K, in], or the mean of what enters it [in].
Vectors = dict[str, "Tensor"]


class GateOptions(Options):
    """How gates are trained: steps of Adam, each on the next `items` of the anchor's items."""

    steps: int = Field(50, ge=0)
    learning_rate: float = Field(0.01, gt=0.0)
    items: int = Field(8, ge=1)


class Gates(Result):
    """`file`: per layer the gates of all anchors [K, in]."""

    file: File


@stage(version=1, libraries=LIBRARIES, uses_model=True)
def gates(options: GateOptions, bank: Bank, candidates: File, setting: Setting) -> Gates:
    """The gates of the bank's pieces, trained on each anchor's own items."""
    from safetensors.torch import save_file

    from tasks.lora.bank import read_bank
    from tasks.lora.tokens import joined

    anchors = [users_in_order(candidates, one.members) for one in bank.members]
    with loaded_model(setting) as model:
        samples = [joined(model.tokens("profile", members)) for members in anchors]
        made = trained_gates(model.base, read_bank(store().path(bank.file)), samples, options)
    with store().new("gates") as folder:
        save_file(made, folder.path / FILE)
    return Gates(file=folder.file(FILE))


def trained_gates(
    base: Base,
    bank: LoadedBank,
    samples: Sequence[Sequence[Encoded]],
    options: GateOptions,
    positions: int | None = None,
) -> Vectors:
    """Gates (CPU), trained from 0 on each anchor's samples, one anchor after the other.

    positions: the most of a pass. Raises InputError for a sample that does not fit in the device's
    memory.
    """
    import torch

    from tasks.lora.group_train import default_positions
    from tasks.lora.signature import hooked

    most = positions or default_positions(base)
    by_anchor: list[Vectors] = []
    # Without dropout, the mode matters for checkpointing only: transformers does it in training.
    base.model.train(base.model.is_gradient_checkpointing)
    try:
        for number, of_anchor in enumerate(samples):
            lora, stream = bank.of([number]).to(base.device).one(0), cycle(of_anchor)
            made = {name: torch.zeros_like(a[0]) for name, (a, _) in lora.layers.items()}
            leaves = [one.requires_grad_() for one in made.values()]
            adam = torch.optim.Adam(leaves, lr=options.learning_rate)
            with hooked(base, [*made], partial(gated, lora, made)):
                for _ in range(options.steps):
                    _fill(base, leaves, [*islice(stream, options.items)], most)
                    adam.step()
            by_anchor.append({name: one.detach().cpu() for name, one in made.items()})
    finally:
        base.model.eval()
    return {name: torch.stack([gates[name] for gates in by_anchor]) for name in bank.layers}


def _fill(base: Base, leaves: list[Tensor], step: list[Encoded], positions: int) -> None:
    """Write the gradients of the step's loss (mean over answer tokens), pass by pass."""
    import torch

    from tasks.lora.forward import label_losses, row_limit
    from tasks.lora.packing import Span, pack, span_batches, work_off

    labels, limit = sum(one.labels for one in step), row_limit(base, [step])
    for one in leaves:
        one.grad = torch.zeros_like(one)

    def work(batch: list[Span]) -> None:
        parts = [step[span] for _, span in batch]
        packed = pack(parts, base.tokenizer.pad_token_id, limit).to(base.device)
        loss = label_losses(base, packed).sum() / labels
        # Sums come after all that may run out of memory: a pass that fails is repeated.
        for one, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
            assert one.grad is not None
            one.grad += gradient

    work_off(span_batches({0: step}, limit, positions), {0: step}, work)


def gated(lora: Lora, gates: Vectors, name: str, x: Tensor, out: Tensor) -> Tensor:
    """A layer's output plus its piece's update, weighed token by token by the gate."""
    a, b = lora.layers[name]
    wide = x.to(a.dtype)
    update = (wide @ gates[name]).sigmoid()[..., None] * (wide @ a.T @ b.T)
    return out + (lora.scale * update).to(out.dtype)


def assemble(bank: LoadedBank, gates: Vectors, means: Vectors, top: int) -> Lora:
    """A user's LoRA, of rank `top` * r, by the means of what enters the layers."""
    from tasks.lora.adapters import Lora

    layers = {}
    for name, (a, b) in bank.layers.items():
        scores = gates[name] @ means[name]
        best = scores.argsort(descending=True, stable=True)[:top]
        heavy = scores[best].softmax(0)[:, None, None] * b[best]
        layers[name] = (a[best].flatten(0, 1), heavy.transpose(0, 1).flatten(1))
    return Lora(layers, bank.scale)


def assembled(batch: Batch) -> Adapted:
    """The LoRAs of a batch's users, assembled from pieces."""
    from safetensors.torch import load_file

    from tasks.lora.signature import mean_inputs

    setting, merger, fitted = batch.setting, batch.merger, batch.fitted
    assert merger
    assert isinstance(fitted, Gates)
    bank, trained = merger.bank, load_file(store().path(fitted.file))
    top, libraries = len(merger.recipes[batch.names[0]].anchors), library_versions(LIBRARIES)
    shared = key_of("per_pcs", METHOD.version, libraries, fitted, merger.merged.bank, top, setting)
    keys = [key_of(shared, content(user["profile"])) for user in batch.users]

    def make(numbers: Sequence[int], _: object) -> list[Made]:
        with loaded_model(setting) as model:
            samples = model.tokens("profile", [batch.users[number] for number in numbers])
            means = [mean_inputs(model.base, [*trained], [*of_user]) for of_user in samples]
            loras = [assemble(bank, trained, mean, top) for mean in means]
            each = model.seconds_each(len(samples))
        trainings = [Training(items=len(of_user), seconds=each) for of_user in samples]
        return list(zip(loras, trainings, strict=True))

    return batch.stacked(keys, make, kept=PIECE * top * len(bank.layers))


def fit(config: MethodConfig, users: Prepared, setting: Setting, merged: Merged | None) -> Result:
    """The gates, trained once for all users."""
    assert merged
    return gates(GateOptions(), merged.bank, users.anchor, setting)


METHOD = Method(
    "per_pcs", version=2, order=38, settings=WITHOUT_EVIDENCE, merged=True, fit=fit,
    adapt=assembled, grouped=True, default=False,
)  # fmt: skip

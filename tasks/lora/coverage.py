"""What of a model its LoRAs are on, and which weights no LoRA can be on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from tasks.lora.grouped import target_layers
from tasks.lora.targets import AnyModel, Names

# Modules whose weights are no bare parameters.
_LAYERS = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Coverage:
    """`adapted` of the `linear` layers (all but the output embedding) have a LoRA.

    share: of the adapted layers in all parameters (tied ones count once). bare: modules with
    matrices of their own that are no layers, such as experts: class -> (how many, their share).
    """

    adapted: int
    linear: int
    share: float
    bare: dict[str, tuple[int, float]]

    def text(self) -> str:
        """All of it in one line."""
        text = (
            f"a LoRA on {self.adapted} of {self.linear} linear layers, "
            f"{_percent(self.share)} of the parameters"
        )
        if self.bare:
            named = [f"{n} {name} ({_percent(share)})" for name, (n, share) in self.bare.items()]
            text += f"; none on the bare parameters of {', '.join(named)}"
        return text


def coverage(model: AnyModel, target_modules: Names) -> Coverage:
    """Counted on a model, also on the meta device. Raises InputError as `target_layers`."""
    total = _size(model.parameters())
    adapted = target_layers(model, target_modules).values()
    head = model.get_output_embeddings()
    linear = [one for one in model.modules() if isinstance(one, nn.Linear | Conv1D)]
    bare: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        matrices = any(own.ndim > 1 for own in module.parameters(recurse=False))
        if matrices and not isinstance(module, _LAYERS):
            bare.setdefault(type(module).__name__, []).append(module)
    shares = {
        name: (len(alike), sum(_size(one.parameters(recurse=False)) for one in alike) / total)
        for name, alike in bare.items()
    }
    return Coverage(
        adapted=len(adapted),
        linear=sum(one is not head for one in linear),
        share=sum(_size(one.parameters()) for one in adapted) / total,
        bare=dict(sorted(shares.items(), key=lambda one: -one[1][1])),
    )


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(one.numel() for one in parameters)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "under 1%"

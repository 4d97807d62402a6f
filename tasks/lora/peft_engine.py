"""The slow engine: stock PEFT, one user after another.

For models that the grouped engine cannot put LoRAs on: experts as bare parameters, layers with a
state. The public functions take and return the same as those of the grouped engine.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, chain
from typing import Any, TypeVar

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tasks.lora import answer
from tasks.lora.adapters import Factors, Lora, LoraBatch, from_peft, to_peft
from tasks.lora.answer import Parts
from tasks.lora.base import Base
from tasks.lora.batches import PerUser
from tasks.lora.checkpoint import Checkpoint, Saved
from tasks.lora.group_train import Frozen
from tasks.lora.grouped import Layers, Shapes, fresh
from tasks.lora.targets import AnyModel, Names, sizes_of
from tasks.lora.train import Outcome, Training, epochs, fit

# One user's questions or samples.
OfUser = TypeVar("OfUser")
Result = TypeVar("Result")


def shapes_of(
    model: AnyModel, target_modules: Names, rank: int, target_parameters: Sequence[str] = ()
) -> Shapes:
    """The shapes of a LoRA on all that PEFT chooses; each matrix of a bare parameter is a layer."""
    return Shapes(sizes_of(model, target_modules, target_parameters), rank)


@contextmanager
def grouped(_model: AnyModel, _names: Sequence[str]) -> Iterator[Layers]:
    """No layer is replaced: `attached` puts each user's LoRAs on in the user's turn."""
    yield {}


@contextmanager
def attached(
    model: AnyModel, loras: Sequence[Lora]
) -> Iterator[tuple[LoraConfig, dict[str, Factors]]]:
    """`model` with the LoRAs as active PEFT adapters; without them again at the end.

    Yields the last LoRA's configuration and parameters, which are trainable; all others are frozen.
    Raises ValueError for a layer that PEFT puts no LoRA on.
    """
    stock: Any = None
    config, layers = LoraConfig(), dict[str, Factors]()
    try:
        for number, lora in enumerate(loras):
            name, (config, factors) = str(number), to_peft(lora)
            changed = replace(config)  # PEFT changes it
            with torch.device("meta"):  # the factors take the place of these weights below
                if stock is None:
                    stock = get_peft_model(model, changed, name)
                else:
                    stock.add_adapter(name, changed)
            layers = {}
            for layer, pair in factors.items():
                module: Any = model.get_submodule(layer)
                if not isinstance(module, LoraLayer) or name not in module.lora_A:
                    raise ValueError(f"{layer} has a LoRA, but PEFT puts none there")
                a, b = [nn.Parameter(one.to(model.device)) for one in pair]
                module.lora_A[name].weight, module.lora_B[name].weight = a, b
                layers[layer] = (a, b)
        if stock is not None:
            stock.base_model.set_adapter([str(number) for number in range(len(loras))])
            stock.requires_grad_(False)
        for factor in chain(*layers.values()):
            factor.requires_grad_(True)
        yield config, layers
    finally:
        model.eval()
        if stock is not None:
            stock.unload()


def train_group(
    base: Base,
    _layers: Layers,
    shapes: Shapes,
    samples: PerUser,
    options: Training,
    seeds: Sequence[int],
    *,
    scale: float,
    frozen: Frozen | None = None,
    progress: Callable[[int, int], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Outcome:
    """As `group_train.train_group`; `checkpoint` keeps the users that are done."""
    flat = fresh(shapes, seeds)
    outcome, first = Outcome(flat, [[] for _ in samples], [0] * len(samples)), 0
    sizes = map(len, samples)
    steps = [list(epochs(size, options, seed)) for size, seed in zip(sizes, seeds, strict=True)]
    if saved := checkpoint.load() if checkpoint else None:
        first, outcome = saved.step, Outcome(saved.tensors["flat"], **saved.facts)
        flat = outcome.flat
    ends = [0, *accumulate(map(len, steps))]
    for user in range(first, len(samples)):

        def done(step: int, _steps: int, before: int = ends[user]) -> None:
            if progress:
                progress(before + step, ends[-1])

        loras = [frozen([user]).one(0)] if frozen else []
        loras += shapes.loras(flat[user : user + 1], scale)
        with attached(base.model, loras) as (config, layers):
            parameters: Any = list(chain(*layers.values()))
            trained = fit(base, parameters, samples[user], steps[user], options, done)
        with torch.no_grad():
            flat[user] = shapes.join([from_peft(config, layers)])[0]
        if trained.failed:
            outcome.failed.append(user)
        outcome.losses[user], outcome.tokens[user] = trained.losses, trained.tokens
        outcome.computed += trained.computed
        if checkpoint and checkpoint.due():
            checkpoint.save(Saved(user + 1, {"flat": flat}, outcome.facts()))
    return outcome


def answer_users(
    base: Base, layers: Layers, questions: PerUser, parts: Parts, max_new_tokens: int
) -> list[list[str]]:
    """As `answer.answer_users`."""

    return _one_by_one(
        base, questions, parts,
        lambda asked: answer.answer_users(base, layers, [asked], _attached, max_new_tokens, 1),
    )  # fmt: skip


def answer_log_p(
    base: Base, layers: Layers, samples: Sequence[PerUser], parts: Parts
) -> list[list[list[Tensor]]]:
    """As `answer.answer_log_p`."""

    return _one_by_one(
        base, samples, parts, lambda asked: answer.answer_log_p(base, layers, [asked], _attached, 1)
    )


def evidence(
    base: Base, layers: Layers, samples: PerUser, anchors: LoraBatch, asked: Tensor | None = None
) -> Tensor:
    """As `answer.evidence`."""
    asked = torch.ones(len(samples), anchors.count, dtype=torch.bool) if asked is None else asked
    columns = []
    for k in range(anchors.count):
        with attached(base.model, [anchors.one(k)]):
            column = asked[:, k : k + 1]
            columns.append(answer.summed_evidence(base, layers, samples, column, None, 1))
    return torch.cat(columns, dim=1)


def _one_by_one(
    base: Base, per_user: Sequence[OfUser], parts: Parts, work: Callable[[OfUser], list[Result]]
) -> list[Result]:
    """What `work` makes of each user's questions or samples, with the user's LoRAs on the model.

    It takes batches of one position, so of one sample: padding would change a layer's state.
    """
    results = []
    for user, of_user in enumerate(per_user):
        with attached(base.model, [some.one(0) for some in parts([user]) if some]):
            results += work(of_user)
    return results


def _attached(_users: Sequence[int]) -> tuple[None, None]:
    """No parts for grouped layers: the LoRAs are on the model already."""
    return None, None

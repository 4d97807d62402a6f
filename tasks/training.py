"""Training with the engine, by the options of a section; and checkpoints to go on from.

A job that trains has one, <store>/../checkpoints/<stage>/<key>.safetensors, until its result is
there. What it holds was trained on users, so it names them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.config.options import ComputeOptions, TrainingOptions
from tasks.log import log
from tasks.record import digest
from tasks.results.models import Training
from tasks.results.store import store

if TYPE_CHECKING:
    from tasks.lora.adapters import Lora
    from tasks.lora.bank import Bank
    from tasks.lora.base import Base
    from tasks.lora.batches import Encoded
    from tasks.lora.checkpoint import Checkpoint
    from tasks.lora.merge import MergedUsers
    from tasks.lora.tokens import Samples
    from tasks.lora.train import Outcome
    from tasks.lora.train import Training as EngineOptions


def train_loras(
    base: Base,
    options: TrainingOptions,
    samples: Sequence[Sequence[Encoded]],
    seeds: Sequence[int],
    merged: MergedUsers | None = None,
    initial: Sequence[Lora] | None = None,
    progress: Callable[[int, int], None] | None = None,
    checkpoint: Checkpoint | None = None,
    engine: str = "grouped",
) -> tuple[list[Lora], Outcome]:
    """One LoRA per user, trained at once on the users' samples, over their merged LoRAs if any.

    initial: one LoRA per user to go on from, instead of fresh ones by `seeds`. checkpoint: where
    the state is kept. engine: `base.engine`.
    """
    own = engine_of(engine)
    more = [options.target_parameters] if options.target_parameters else []
    shapes = own.shapes_of(base.model, options.target_modules, options.rank, *more)
    scale = options.alpha / options.rank
    names = sorted({*shapes.sizes, *(merged.layers if merged else ())})
    with own.grouped(base.model, names) as layers:
        outcome = own.train_group(
            base,
            layers,
            shapes,
            samples,
            training_from(options),
            seeds,
            scale=scale,
            frozen=merged.parts if merged else None,
            initial=shapes.join(initial) if initial else None,
            progress=progress,
            checkpoint=checkpoint,
        )
    return shapes.loras(outcome.flat.cpu(), scale), outcome


def log_likelihoods(
    base: Base,
    bank: Bank,
    samples: Sequence[Sequence[Encoded]],
    asked: Sequence[Sequence[bool]] | None = None,
    engine: str = "grouped",
) -> NDArray[np.float64]:
    """[U, K]: log p of each user's answers under each of the bank's LoRAs; NaN where not `asked`.

    In four decimals: the company of other users moves the last bits of a sum.
    """
    import torch

    own = engine_of(engine)
    with own.grouped(base.model, list(bank.layers)) as layers:
        whom = None if asked is None else torch.tensor(asked)
        table = own.evidence(base, layers, samples, bank, asked=whom)
    found: NDArray[np.float64] = np.round(table.double().numpy(), 4)
    return found


def trainings(outcome: Outcome, samples: Sequence[Samples], seconds: float = 0.0) -> list[Training]:
    """How each user's training went; `seconds` each."""
    return [
        Training(
            items=len(own),
            steps=len(outcome.losses[number]),
            tokens=outcome.tokens[number],
            truncated=own.truncated,
            losses=tuple(outcome.losses[number]),
            failed=number in outcome.failed,
            seconds=seconds,
        )
        for number, own in enumerate(samples)
    ]


def training_from(options: TrainingOptions) -> EngineOptions:
    """The options as the engine takes them."""
    from tasks.lora.train import Training as EngineOptions

    names = {field.name for field in fields(EngineOptions)}
    return EngineOptions(**options.model_dump(include=names))


def engine_of(name: str) -> Any:
    """The module with the engine's functions: many users at once, or stock PEFT, one by one."""
    if name == "peft":
        from tasks.lora import peft_engine

        return peft_engine
    from tasks.lora import grouped_engine

    return grouped_engine


@contextmanager
def checkpoint(
    compute: ComputeOptions, stage: str, key: str, users: Sequence[str]
) -> Iterator[Checkpoint | None]:
    """Where the training of `key` keeps its state; None where it is to keep none.

    key: of all that the training depends on. users: all whom it trains on. The file is removed when
    the block ends well: keep what was trained inside it.
    """
    from tasks.lora.checkpoint import VERSION, Checkpoint

    if not compute.checkpoint_seconds:
        yield None
        return
    path = store().checkpoints / stage / f"{key}.safetensors"
    about, work = {"stage": stage, "users": list(users)}, digest([VERSION, stage, key])
    yield Checkpoint(path, work, about, compute.checkpoint_seconds, log)
    path.unlink(missing_ok=True)

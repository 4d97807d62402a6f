"""The base model at work in a stage: its tokens, training, likelihoods; and checkpoints.

A job that trains has a checkpoint, <store>/../checkpoints/<stage>/<key>.safetensors, until its
result is there. It names the users that it was trained on, for whoever finds the file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.config.options import ComputeOptions, TrainingOptions
from tasks.log import log
from tasks.record import digest
from tasks.results import models
from tasks.results.models import Setting, Training
from tasks.results.store import store
from tasks.running.slots import gpu_slot
from tasks.text.loading import load, model_folder
from tasks.text.questions import User
from tasks.text.tokens import Kind, tokens_of

if TYPE_CHECKING:
    from tasks.lora.adapters import Lora
    from tasks.lora.bank import Bank
    from tasks.lora.base import Base
    from tasks.lora.batches import Encoded
    from tasks.lora.checkpoint import Checkpoint
    from tasks.lora.merge import MergedUsers
    from tasks.lora.targets import AnyModel
    from tasks.lora.tokens import Samples
    from tasks.lora.train import Training as EngineOptions

# A user's or an anchor's LoRA, and how its training went.
Made = tuple["Lora", Training]


@contextmanager
def loaded_model(setting: Setting, quantisation: str = "none") -> Iterator[Model]:
    """Load a setting's model, holding a slot of the GPU."""
    with gpu_slot():
        started = time.perf_counter()
        yield Model(setting, load(setting.base, setting.compute, quantisation), started)


@dataclass(frozen=True)
class Model:
    """A loaded base model in its setting. started: when the stage began to use it."""

    setting: Setting
    base: Base
    started: float = field(default_factory=time.perf_counter)

    @property
    def engine(self) -> Any:
        """The module with the engine's functions: many users at once, or stock PEFT, one by one."""
        if self.setting.base.engine == "peft":
            from tasks.lora import peft_engine

            return peft_engine
        from tasks.lora import grouped_engine

        return grouped_engine

    def tokens(self, kind: Kind, users: Iterable[User]) -> list[Samples]:
        """Each user's samples of a kind (tasks/text/tokens.py)."""
        return tokens_of(self.setting.questions, self.setting.base, self.base, kind, users)

    def seconds_each(self, count: int) -> float:
        """The seconds since the stage began, divided among `count` users."""
        return round((time.perf_counter() - self.started) / count, 4)

    def train(
        self,
        options: TrainingOptions,
        samples: Sequence[Sequence[Encoded]],
        seeds: Sequence[int],
        merged: MergedUsers | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> list[Made]:
        """One LoRA per user, trained at once on the users' samples, over their merged LoRAs if any.

        checkpoint: keeps the training's state.
        """
        from tasks.lora.tokens import Samples

        more = [options.target_parameters] if options.target_parameters else []
        shapes = self.engine.shapes_of(self.base.model, options.target_modules, options.rank, *more)
        scale = options.alpha / options.rank
        names = sorted({*shapes.sizes, *(merged.layers if merged else ())})
        with self.engine.grouped(self.base.model, names) as layers:
            outcome = self.engine.train_group(
                self.base, layers, shapes, samples, training_from(options), seeds,
                scale=scale, frozen=merged.parts if merged else None,
                progress=progress, checkpoint=checkpoint,
            )  # fmt: skip
        each = self.seconds_each(len(samples))
        how = [
            Training(
                items=len(items),
                steps=len(outcome.losses[number]),
                tokens=outcome.tokens[number],
                truncated=items.truncated
                if isinstance(items, Samples)
                else sum(one.truncated for one in items),
                losses=tuple(outcome.losses[number]),
                failed=number in outcome.failed,
                seconds=each,
            )
            for number, items in enumerate(samples)
        ]
        return list(zip(shapes.loras(outcome.flat.cpu(), scale), how, strict=True))

    def log_likelihoods(
        self,
        bank: Bank,
        samples: Sequence[Sequence[Encoded]],
        asked: Sequence[Sequence[bool]] | None = None,
    ) -> NDArray[np.float64]:
        """[U, K]: log p of users' answers under each of the bank's LoRAs; NaN where not `asked`.

        In four decimals: the other users of a batch change the last bits of a sum.
        """
        import torch

        with self.engine.grouped(self.base.model, list(bank.layers)) as layers:
            whom = None if asked is None else torch.tensor(asked)
            table = self.engine.evidence(self.base, layers, samples, bank, asked=whom)
        rounded: NDArray[np.float64] = np.round(table.double().numpy(), 4)
        return rounded


def bare_model(base: models.Base) -> AnyModel:
    """The layers of a base model, without weights."""
    from transformers import AutoConfig

    from tasks.lora.base import without_weights

    return without_weights(AutoConfig.from_pretrained(model_folder(base), trust_remote_code=False))


def training_from(options: TrainingOptions) -> EngineOptions:
    """The options in the engine's type."""
    from tasks.lora.train import Training as EngineOptions

    names = {field.name for field in fields(EngineOptions)}
    return EngineOptions(**options.model_dump(include=names))


@contextmanager
def checkpoint(
    compute: ComputeOptions, stage: str, key: str, users: Sequence[str]
) -> Iterator[Checkpoint | None]:
    """Where a training keeps its state; None with `checkpoint_seconds` 0.

    key: of all that the training depends on. users: all that it trains on. The file is removed when
    the block ends well, so store what was trained inside the block.
    """
    from tasks.lora.checkpoint import VERSION, Checkpoint

    if not compute.checkpoint_seconds:
        yield None
        return
    path = store().checkpoints / stage / f"{key}.safetensors"
    about, work = {"stage": stage, "users": list(users)}, digest([VERSION, stage, key])
    yield Checkpoint(path, work, about, compute.checkpoint_seconds, log)
    path.unlink(missing_ok=True)

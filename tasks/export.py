"""One user's LoRA (merged and stacked, as one) as an ordinary PEFT folder: `mta export`.

It loads in stock PEFT: `PeftModel.from_pretrained(base, "my-lora")`. `mta.json` in it says how
prompts look.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, reduce
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.errors import InputError, label
from tasks.fusion import Merger
from tasks.methods import METHODS, MethodName
from tasks.report.files import shown_run
from tasks.results.models import Answers, Base
from tasks.results.run import Cell, Run
from tasks.results.store import store
from tasks.text.loading import model_folder, model_name
from tasks.text.questions import shown_prompt

if TYPE_CHECKING:
    from tasks.lora.adapters import Lora
    from tasks.lora.bank import Bank as LoadedBank
    from tasks.record import File


def export(
    run: Run,
    lamp_task: str,
    method: MethodName,
    user_id: str,
    folder: Path,
    seed: int | None = None,
) -> Path:
    """Write the LoRA that `method` gives the user to `folder`, which must not exist yet.

    seed: one of the run's, None for its first. Returns the base model's folder. Raises InputError
    when the run has no such seed, LaMP task, method or user.
    """
    cell = cell_of(run, lamp_task, method, seed)
    if folder.exists():
        raise InputError(f"--to {folder}: is there already; name a new folder")
    batch = batch_of(run, cell, method, user_id)
    lora = whole_lora(cell, MethodLoras(cell, method).of(user_id, batch))
    write_folder(folder, lora, cell.base, about(cell, method) | {"user": user_id})
    return model_folder(cell.base)


def cell_of(run: Run, lamp_task: str | None, method: MethodName, seed: int | None) -> Cell:
    """The cell of a run with a LaMP task and seed (None: the first) where `method` made LoRAs.

    Raises InputError, which names the option, where the run has none.
    """
    seeds = list(dict.fromkeys(one.config.seed for one in run.cells))
    seed = seeds[0] if seed is None else seed
    _listed("--seed", str(seed), map(str, seeds))
    cells = {one.config.lamp_task: one for one in run.cells if one.config.seed == seed}
    lamp_task = next(iter(cells)) if lamp_task is None else lamp_task
    _listed("--lamp-task", lamp_task, cells)
    cell = cells[lamp_task]
    # A registered bank has no answers: its methods merge for new users.
    adapted = [name for name in METHODS
               if any(one.merged or one.stacked for one in cell.answers.get(name, ()))
               or (cell.merging(name) and not cell.answers)]  # fmt: skip
    if method in cell.answers and method not in adapted:
        raise InputError(
            f"--method {method}: gives no user a LoRA, so there is none to write; it is there for "
            + ", ".join(adapted)
        )
    _listed("--method", method, adapted)
    return cell


def batch_of(run: Run, cell: Cell, method: MethodName, user_id: str) -> Answers:
    """The batch of a few-shot user. Raises InputError where there is none, or it failed."""
    if user_id not in cell.users.few_shot_ids:
        few = ", ".join(map(label, sorted(cell.users.few_shot_ids)[:5]))
        raise InputError(
            f"--user {user_id}: no few-shot user of {shown_run(run)}; there are {few}, ..."
        )
    for batch in cell.answers[method]:
        if user_id in batch.users:
            return batch
    # A part of it is not what the method gives.
    raise InputError(f"--user {user_id}: the run trained no LoRA of this user; run it again")


def about(cell: Cell, method: MethodName) -> dict[str, str]:
    """What `mta.json` says of every user of a method: what it goes with, and how prompts look."""
    own = cell.config.method(method)
    return {
        "lamp_task": cell.config.lamp_task,
        "method": method,
        "base": model_folder(cell.base).name,
        "prompt": shown_prompt(own.prompt, cell.users, own.base.model),
        "chat": own.prompt.chat,
    }


def write_folder(
    folder: Path, lora: Lora, base: Base, about: Mapping[str, str], name: str | None = None
) -> None:
    """Write a LoRA as a PEFT folder, with `about` as its `mta.json`: whole or not at all.

    name: what the folder calls the base model; None: as the run did.
    """
    from tasks.lora.adapters import write_peft

    with whole_folder(folder) as scratch:
        write_peft(scratch, lora, name or model_name(base.model), transposed(model_folder(base)))
        write_about(scratch, about)


@lru_cache(maxsize=1)
def transposed(model: Path) -> bool:
    """Whether a model's linear layers hold their weights as [in, out], as GPT-2's `Conv1D` do."""
    from transformers import AutoConfig
    from transformers.pytorch_utils import Conv1D

    from tasks.lora.base import without_weights

    bare = without_weights(AutoConfig.from_pretrained(model, trust_remote_code=False))
    return any(isinstance(layer, Conv1D) for layer in bare.modules())


def write_about(folder: Path, about: Mapping[str, str]) -> None:
    """Write `mta.json`."""
    (folder / "mta.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which then is `folder`; after a failure there is none."""
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    scratch.rename(folder)


def whole_lora(cell: Cell, loras: Sequence[Lora]) -> Lora:
    """A user's LoRAs as one: their updates sum up."""
    from tasks.lora.merge import concatenate

    # The base model that the folder goes with is the one without the adapter.
    adapter = [_task_lora(store().path(cell.base.adapter))] if cell.base.adapter else []
    return reduce(concatenate, [*adapter, *loras])


@lru_cache(maxsize=1)
def _task_lora(folder: Path) -> Lora:
    """The LoRA of the task, the same for all users of a cell: read once."""
    from tasks.lora.adapters import read_peft

    return read_peft(folder)


class MethodLoras:
    """What a method added to the base model, user by user; bank and batches are read once."""

    def __init__(self, cell: Cell, method: MethodName) -> None:
        merging = cell.merging(method)
        self.merger = Merger(merging.merged) if merging else None
        self._batch: tuple[File | None, LoadedBank | None] = (None, None)

    def of(self, user_id: str, batch: Answers) -> list[Lora]:
        """The merged LoRA and the user's own, as far as there are any. batch: the user's."""
        import torch

        from tasks.lora.bank import read_bank
        from tasks.lora.merge import MergedUsers

        loras = []
        if batch.merged and self.merger:
            merged = MergedUsers(*self.merger.chosen([user_id]), torch.device("cpu"))
            loras.append(merged.parts([0]).one(0))
        if batch.stacked:
            if self._batch[0] != batch.stacked:
                self._batch = (batch.stacked, read_bank(store().path(batch.stacked)))
            if own := self._batch[1]:
                loras.append(own.lora(user_id))
        return loras


def _listed(option: str, value: str, known: Iterable[str]) -> None:
    names = list(known)
    if value not in names:
        raise InputError(f"{option} {value}: not in this run; it has {', '.join(names)}")

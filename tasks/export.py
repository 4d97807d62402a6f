"""Users' LoRAs of a finished run, merged and stacked as one: `mta export`.

A PEFT folder loads in stock PEFT, `PeftModel.from_pretrained(base, "my-lora")`; `mta.json` in it
says how prompts look. vLLM's own resolver finds a user's LoRA in the folder of the user's name, if
its `base_model_name_or_path` is the model that `vllm serve` was started with
(vllm/plugins/lora_resolvers/filesystem_resolver.py). vLLM takes ranks up to `--max-lora-rank`, one
of RANKS (vllm/config/lora.py), and no LoRA on experts' bare parameters. See docs/serving.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.errors import InputError, label
from tasks.files import file_name
from tasks.methods import METHODS, MethodName
from tasks.model import bare_model
from tasks.recipes import Merger
from tasks.report.files import shown_run
from tasks.results.models import Answers, Base
from tasks.results.run import Cell, Run
from tasks.results.store import store
from tasks.text.loading import model_folder, model_name
from tasks.text.questions import shown_prompt

if TYPE_CHECKING:
    from tasks.lora.adapters import Lora
    from tasks.lora.bank import Bank as LoadedBank

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class Finished:
    """A method in one cell of a finished run; bank and batches are read once.

    lamp_task, seed: by default the run's first. Raises InputError, naming the option, if the run
    has no such cell or method, or the method made no LoRAs.
    """

    def __init__(
        self,
        run: Run,
        lamp_task: str | None = None,
        method: MethodName = "mta",
        seed: int | None = None,
    ) -> None:
        seeds = [one.config.seed for one in run.cells]
        seed = seeds[0] if seed is None else seed
        _listed("--seed", str(seed), map(str, seeds))
        cells = {one.config.lamp_task: one for one in run.cells if one.config.seed == seed}
        lamp_task = next(iter(cells)) if lamp_task is None else lamp_task
        _listed("--lamp-task", lamp_task, cells)
        self.run, self.cell, self.method = run, cells[lamp_task], method
        answers = self.cell.answers
        # A registered bank has no answers: its methods only merge for new users.
        adapted = [name for name in METHODS
                   if any(one.merged or one.stacked for one in answers.get(name, ()))
                   or (self.cell.merging(name) and not answers)]  # fmt: skip
        if method in answers and method not in adapted:
            raise InputError(
                f"--method {method}: gives no user a LoRA, so there is none to write; it is there "
                f"for {', '.join(adapted)}"
            )
        _listed("--method", method, adapted)

    @cached_property
    def merger(self) -> Merger | None:
        merging = self.cell.merging(self.method)
        return Merger(merging.merged) if merging else None

    def batch(self, user_id: str) -> Answers:
        """The batch with a few-shot user. Raises InputError if there is none, or it failed."""
        if user_id not in self.cell.users.few_shot_ids:
            few = ", ".join(map(label, sorted(self.cell.users.few_shot_ids)[:5]))
            raise InputError(
                f"--user {user_id}: no few-shot user of {shown_run(self.run)}; there are {few}, ..."
            )
        for batch in self.cell.answers[self.method]:
            if user_id in batch.users:
                return batch
        # A merged LoRA alone would not be what the method gives.
        raise InputError(f"--user {user_id}: the run trained no LoRA of this user; run it again")

    def stacked(self, user_id: str) -> Lora | None:
        """The user's own LoRA, if the method trains one."""
        file = self.batch(user_id).stacked
        return _bank(store().path(file)).lora(user_id) if file else None

    def lora(self, user_id: str) -> Lora:
        """All that the method adds to the base model for a few-shot user, as one LoRA."""
        import torch

        from tasks.lora.merge import MergedUsers

        loras = []
        if self.batch(user_id).merged and self.merger:
            merged = MergedUsers(*self.merger.chosen([user_id]), torch.device("cpu"))
            loras.append(merged.parts([0]).one(0))
        if stacked := self.stacked(user_id):
            loras.append(stacked)
        return whole_lora(self.cell, loras)


def about(cell: Cell, method: MethodName) -> dict[str, str]:
    """What `mta.json` says for every user: the LoRA's base model and method, and its prompts."""
    config = cell.config.method(method)
    return {
        "lamp_task": cell.config.lamp_task,
        "method": method,
        "base": model_folder(cell.base).name,
        "prompt": shown_prompt(config.prompt, cell.users, config.base.model),
        "chat": config.prompt.chat,
    }


def _listed(option: str, value: str, known: Iterable[str]) -> None:
    names = list(dict.fromkeys(known))
    if value not in names:
        raise InputError(f"{option} {value}: not in this run; it has {', '.join(names)}")


def whole_lora(cell: Cell, loras: Sequence[Lora]) -> Lora:
    """A user's LoRAs as one: their updates sum up."""
    from tasks.lora.merge import concatenate

    # The folder is for the base model without `base.task_adapt`, so its LoRA goes in, too.
    adapter = [_task_lora(store().path(cell.base.adapter))] if cell.base.adapter else []
    return reduce(concatenate, [*adapter, *loras])


@lru_cache(maxsize=1)
def _bank(file: Path) -> LoadedBank:
    """The stacked LoRAs of a batch, read once for all its users."""
    from tasks.lora.bank import read_bank

    return read_bank(file)


@lru_cache(maxsize=1)
def _task_lora(folder: Path) -> Lora:
    """The LoRA of `base.task_adapt`, the same for all users of a cell: read once."""
    from tasks.lora.adapters import read_peft

    return read_peft(folder)


def export(finished: Finished, user_id: str, folder: Path) -> Path:
    """Write a few-shot user's LoRA to `folder`; returns the base model's folder.

    Raises InputError if there is no such user, or the folder exists.
    """
    _new(folder)
    lora, base = finished.lora(user_id), finished.cell.base
    write_folder(folder, lora, base, about(finished.cell, finished.method) | {"user": user_id})
    return model_folder(base)


def merged_model(finished: Finished, user_id: str, folder: Path) -> None:
    """Write a user's model as a whole: the base model's weights with the LoRA added.

    Raises InputError as `export`.
    """
    from tasks.lora.base import load_base
    from tasks.lora.merge import add_to_model

    _new(folder)
    lora, base = finished.lora(user_id), finished.cell.base
    loaded = load_base(
        model_folder(base), max_tokens=base.max_tokens, device="cpu", dtype=base.dtype
    )
    add_to_model(loaded.model, lora)
    said = about(finished.cell, finished.method) | {"user": user_id}
    with whole_folder(folder, said) as scratch:
        loaded.model.save_pretrained(scratch)
        loaded.tokenizer.save_pretrained(scratch)


def _new(folder: Path) -> None:
    if folder.exists():
        raise InputError(f"--to {folder}: is there already; name a new folder")


def write_folder(
    folder: Path, lora: Lora, base: Base, said: Mapping[str, str], name: str | None = None
) -> None:
    """Write a LoRA as a PEFT folder with `said` as its `mta.json`: whole or not at all.

    name: the base model's name in the folder; None: as in the run.
    """
    from tasks.lora.adapters import write_peft

    with whole_folder(folder, said) as scratch:
        write_peft(scratch, lora, name or model_name(base.model), transposed(base))


@contextmanager
def whole_folder(folder: Path, said: Mapping[str, str]) -> Iterator[Path]:
    """A scratch folder to write into. Without a failure it gets `mta.json` and becomes `folder`."""
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    (scratch / "mta.json").write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n")
    scratch.rename(folder)


@lru_cache(maxsize=1)
def transposed(base: Base) -> bool:
    """Whether a model's linear layers hold their weights as [in, out], as GPT-2's `Conv1D` do."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(layer, Conv1D) for layer in bare_model(base).modules())


@dataclass(frozen=True)
class Served:
    """A user's folder. error: of the LoRA of lower rank, relative to the update (`merge.cut`)."""

    user: str
    folder: Path
    error: float


def max_lora_rank(rank: int) -> int:
    """The value for `vllm serve --max-lora-rank`. Raises InputError outside 1 to 512."""
    if not 1 <= rank <= RANKS[-1]:
        raise InputError(f"--rank {rank}: vLLM's ranks are 1 to {RANKS[-1]}")
    return next(one for one in RANKS if one >= rank)


def vllm_folders(
    finished: Finished,
    to: Path,
    rank: int = 16,
    tolerance: float | None = None,
    name: str | None = None,
) -> Iterator[Served | InputError]:
    """Write every few-shot user's LoRA, of at most `rank`, into a folder of the user's name.

    name: the model that `vllm serve` is started with; None: the run's. A user whose LoRA loses more
    than `tolerance` gets an error, no folder. Raises InputError if nothing can be written.
    """
    most, base = max_lora_rank(rank), finished.cell.base
    if to.is_dir() and any(to.iterdir()):
        raise InputError(f"--to {to}: holds something already; name a new folder")
    if transposed(base):
        raise InputError(
            f"--format vllm: vLLM takes no LoRAs on layers like GPT-2's ({base.model}); "
            "export with --format peft or merged"
        )
    to.mkdir(parents=True, exist_ok=True)
    said = about(finished.cell, finished.method) | {"max_lora_rank": str(most)}
    for user in finished.cell.users.few_shot_ids:
        try:
            smaller, error = _cut(user, finished.lora(user), rank, tolerance)
            folder = to / file_name(user)
            of_user = {"user": user, "error": f"{error:.6f}"}
            write_folder(folder, smaller, base, said | of_user, name)
            yield Served(user, folder, error)
        except InputError as error:
            yield error


def _cut(user: str, lora: Lora, rank: int, tolerance: float | None) -> tuple[Lora, float]:
    """A user's LoRA cut to at most this rank, and the relative error of that.

    Raises InputError if the error is above the tolerance, or vLLM loads no such LoRA.
    """
    from tasks.lora.merge import cut

    if matrices := [name for name in lora.layers if name.endswith("]")]:
        raise InputError(
            f"user {label(user)}: {matrices[0]} is a matrix of an expert, on which vLLM loads no "
            "LoRA; export with --format peft"
        )
    smaller, error = cut(lora, rank)
    if tolerance is not None and error > tolerance:
        raise InputError(
            f"user {label(user)}: a LoRA of rank {rank} loses {error:.1%} of the update of rank "
            f"{lora.rank}, more than --tolerance {tolerance:g}; raise --rank"
        )
    return smaller, error

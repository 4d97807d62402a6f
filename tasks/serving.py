"""A run's LoRAs for serving: all users' as vLLM finds them, or one user's whole model.

vLLM's own resolver takes the LoRA of a user from the folder of that name, if its
`base_model_name_or_path` is what `vllm serve` was given as the model
(vllm/plugins/lora_resolvers/filesystem_resolver.py). Its LoRAs have at most `--max-lora-rank`,
which is one of RANKS (vllm/config/lora.py), and none on experts' bare parameters. docs/serving.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.errors import InputError, label
from tasks.export import (
    MethodLoras,
    about,
    batch_of,
    cell_of,
    transposed,
    whole_folder,
    whole_lora,
    write_about,
    write_folder,
)
from tasks.files import file_name
from tasks.methods import MethodName
from tasks.results.run import Run
from tasks.text.loading import model_folder

if TYPE_CHECKING:
    from tasks.lora.adapters import Lora

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Served:
    """A user's folder. error: how far the LoRA of less rank is off, relative (`merge.cut`)."""

    user: str
    folder: Path
    error: float


def max_lora_rank(rank: int) -> int:
    """What `vllm serve --max-lora-rank` is to be. Raises InputError for a rank it has not."""
    if not 1 <= rank <= RANKS[-1]:
        raise InputError(f"--rank {rank}: vLLM's ranks are 1 to {RANKS[-1]}")
    return next(one for one in RANKS if one >= rank)


def vllm_folders(
    run: Run,
    to: Path,
    *,
    lamp_task: str | None = None,
    method: MethodName = "mta",
    seed: int | None = None,
    rank: int = 16,
    tolerance: float | None = None,
    base: str | None = None,
) -> Iterator[Served | InputError]:
    """Write every few-shot user's LoRA, of at most `rank`, into a folder of the user's name.

    base: what `vllm serve` is given as the model; None: the run's. A user whose LoRA loses more
    than `tolerance` gets no folder, but a line. Raises InputError where nothing can be written.
    """
    most = max_lora_rank(rank)
    cell = cell_of(run, lamp_task, method, seed)
    if to.is_dir() and any(to.iterdir()):
        raise InputError(f"--to {to}: holds something already; name a new folder")
    if transposed(model_folder(cell.base)):
        raise InputError(
            f"--format vllm: vLLM takes no LoRAs on layers like GPT-2's ({cell.base.model}); "
            "export with --format peft or merged"
        )
    to.mkdir(parents=True, exist_ok=True)
    loras, said = MethodLoras(cell, method), about(cell, method)
    for user in cell.users.few_shot_ids:
        try:
            own = whole_lora(cell, loras.of(user, batch_of(run, cell, method, user)))
            smaller, error = _cut(user, own, rank, tolerance)
            told = {"max_lora_rank": str(most), "user": user, "error": f"{error:.6f}"}
            folder = to / file_name(user)
            write_folder(folder, smaller, cell.base, said | told, base)
            yield Served(user, folder, error)
        except InputError as error:
            yield error


def _cut(user: str, lora: Lora, rank: int, tolerance: float | None) -> tuple[Lora, float]:
    """A user's LoRA of at most this rank, and what that loses.

    Raises InputError where it is more than the tolerance, or vLLM loads no such LoRA.
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


def merged_model(
    run: Run,
    to: Path,
    user: str,
    *,
    lamp_task: str | None = None,
    method: MethodName = "mta",
    seed: int | None = None,
) -> None:
    """Write one user's model as a whole: the base model's weights with the LoRA added.

    Raises InputError as `export`, and where `to` is there already.
    """
    from tasks.lora.base import load_base
    from tasks.lora.merge import add_to_model

    cell = cell_of(run, lamp_task, method, seed)
    if to.exists():
        raise InputError(f"--to {to}: is there already; name a new folder")
    lora = whole_lora(cell, MethodLoras(cell, method).of(user, batch_of(run, cell, method, user)))
    base = cell.base
    loaded = load_base(
        model_folder(base), max_tokens=base.max_tokens, device="cpu", dtype=base.dtype
    )
    add_to_model(loaded.model, lora)
    with whole_folder(to) as scratch:
        loaded.model.save_pretrained(scratch)
        loaded.tokenizer.save_pretrained(scratch)
        write_about(scratch, about(cell, method) | {"user": user})

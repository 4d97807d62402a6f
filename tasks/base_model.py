"""Stage 2: the frozen base model. `tiny` is trained on the base users, others are as given."""

from __future__ import annotations

import os
import random
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.adapted import noted
from tasks.config import RunConfig, derive_seed, overlay
from tasks.errors import InputError
from tasks.lamp import history
from tasks.lamp.definitions import get_task
from tasks.lamp.prompts import LAYOUT
from tasks.prepare import each_user
from tasks.prepare_lines import naming_dropped
from tasks.questions import profile_questions, user_queries
from tasks.running.progress import Progress
from tasks.stage import gpu_slot, stage, store
from tasks.store.artifacts import Store
from tasks.store.checkpoints import checkpoint_of, remove
from tasks.store.pieces import Piece, digest, library_versions

if TYPE_CHECKING:
    from tasks.lamp.prompts import Sample
    from tasks.lora.base import Base

VERSION = 2
# The libraries that decide the numbers of every stage that runs the model.
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")
# Weights other than safetensors are never fetched: they could be pickles.
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@stage(name="base-model", uses_model=True)
def base_model(config: dict[str, Any], lamp_task: str, prepared: dict[str, Any]) -> Piece:
    """The base model: a folder `model` in the store (`tiny`), or the hash of the model given."""
    options = RunConfig.model_validate(config)
    where = store()
    if options.base.quantisation == "nf4":
        from tasks.lora.base import nf4, pick_device

        nf4(pick_device(options.compute.device))  # without the library nothing could be answered
    if options.base.model != "tiny":
        return _external(options, where)
    key = digest(
        {
            "version": VERSION,
            "libraries": library_versions(LIBRARIES),
            "lamp_task": lamp_task,
            "users": prepared["value"]["sha256"]["base"],
            **prompt_parts(options, prepared["value"]["instruction"]),
            "tiny": options.base.tiny.model_dump(),
            "history": [options.rag.history_items, history.VERSION, *_index(options)]
            if options.base.tiny.history_share
            else None,
            "max_tokens": options.base.max_tokens,
            "seed": options.seed,
        }
    )

    def make(out: Path) -> dict[str, Any]:
        from tasks.lora.base import pick_device
        from tasks.lora.tiny import train_tiny

        use_threads(options)
        tiny = options.base.tiny
        named = []
        questions = []
        for user in each_user(where, prepared, "base"):
            named.append(user["user_id"])
            lessons = _lessons(options, lamp_task, prepared["value"]["instruction"], user)
            questions += [(sample.prompt, sample.answer) for sample in lessons]
        if not questions:
            with naming_dropped(prepared["value"]["dropped"], lamp_task):
                raise InputError(
                    "base.model: tiny is trained on base users and the data has none; raise "
                    "split.base_share, add user_base_LLM.json, or give base.model"
                )
        progress = Progress("base-model", f"{lamp_task}: training the tiny base model", tiny.steps)
        with gpu_slot():
            trained = train_tiny(
                out / "model",
                questions,
                hidden=tiny.hidden,
                layers=tiny.layers,
                heads=tiny.heads,
                steps=tiny.steps,
                batch_size=tiny.batch_size,
                learning_rate=tiny.learning_rate,
                vocabulary=tiny.max_vocabulary,
                max_tokens=options.base.max_tokens,
                seed=options.seed,
                device=pick_device(options.compute.device),
                progress=progress.update,
                checkpoint=checkpoint_of(options, where, "base_model", key, named),
            )
        return {
            "model": "tiny",
            "questions": len(questions),
            "losses": trained.losses,
            "tokens": trained.tokens,
            "truncated": trained.truncated,
        }

    piece = where.get("base_model", key, make)
    remove(where, "base_model", key)
    return noted(options, where, piece, piece.folder / "model")


def _lessons(
    options: RunConfig, lamp_task: str, instruction: str, user: dict[str, Any]
) -> list[Sample]:
    """What the tiny model learns from one user: each item once, some with history before it.

    Where items are no questions (LaMP-7), it learns from the queries what a question is.
    """
    plain = profile_questions(options, lamp_task, instruction, user["profile"])
    if get_task(lamp_task).items == "completed":
        return plain + user_queries(options, lamp_task, instruction, user)
    share = options.base.tiny.history_share
    if not share:
        return plain
    shown = {"prompt": {"history_items": options.rag.history_items}}
    longer = RunConfig.model_validate(overlay(options.model_dump(), shown))
    with_history = profile_questions(longer, lamp_task, instruction, user["profile"])
    generator = random.Random(derive_seed(options.seed, "lessons", user["user_id"]))
    return [
        long if generator.random() < share else short
        for short, long in zip(plain, with_history, strict=True)
    ]


_LOADED = threading.local()


def load(options: RunConfig, where: Store, base: dict[str, Any], answering: bool = False) -> Base:
    """The loaded base model of a `base_model` result; to answer with, in `base.quantisation`.

    Each thread keeps the last one: the next job most likely wants the same, and a large model
    takes longer to load than a batch of users to train. Raises InputError where the files are not
    those of the result, on this machine or by now.
    """
    from tasks.lora.adapters import read_peft
    from tasks.lora.base import load_base
    from tasks.lora.merge import add_to_model

    use_threads(options)
    adapter = base.get("adapter")
    quantisation = options.base.quantisation if answering else "none"
    if adapter and quantisation != "none":
        raise InputError(
            f"base.quantisation {quantisation}: the model is adapted in memory "
            "(base.task_adapt), which 4-bit weights cannot take; use one of the two"
        )
    own = options.base.model_dump_json(exclude={"quantisation"})
    how = (options.compute.device, options.prompt.chat, quantisation)
    wanted = (base["ref"]["sha256"], adapter["ref"]["sha256"] if adapter else None, own, how)
    kept = getattr(_LOADED, "base", None)
    if kept is None or kept[0] != wanted:
        _LOADED.base = kept = None  # before the next one takes memory
        folder = base_folder(options, where, base)
        _confirm(options, where, base, folder)
        loaded = load_base(
            folder,
            max_tokens=options.base.max_tokens,
            device=options.compute.device,
            dtype=options.base.dtype,
            gradient_checkpointing=options.base.gradient_checkpointing,
            chat=options.prompt.chat,
            quantisation=quantisation,
        )
        if adapter:
            add_to_model(loaded.model, read_peft(where.open(adapter["ref"]).folder / "adapter"))
        # Now: the next job does not read it again.
        where.confirm()
        _confirm(options, where, base, folder)
        _LOADED.base = kept = (wanted, loaded)
    return kept[1]


def unload() -> None:
    """Let this thread's loaded base model go: other threads keep one of their own."""
    _LOADED.base = None


def use_threads(options: RunConfig) -> None:
    """Set torch's CPU threads for this process, by `compute.threads`."""
    import torch

    compute = options.compute
    # On Ray a job has the cores it asked for, beside other jobs.
    cores = int(max(compute.cpus_per_job, 1)) if compute.runner == "ray" else os.cpu_count() or 1
    chosen = compute.threads or (1 if options.base.model == "tiny" else cores)
    torch.set_num_threads(chosen)


def model_parts(
    options: RunConfig, base: dict[str, Any], answering: bool = False
) -> dict[str, Any]:
    """What a stage that runs the base model, or answers with it, depends on, for its cache key."""
    device = _device(options)
    dtype = options.base.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    adapted = {"task_adapt": base["adapter"]["ref"]["sha256"]} if "adapter" in base else {}
    quantised: dict[str, Any] = {}
    if answering and options.base.quantisation != "none":
        how = options.base.quantisation
        quantised = {"quantisation": [how, library_versions(("bitsandbytes",))]}
    return {
        **quantised,
        "libraries": library_versions(LIBRARIES),
        "base": base["ref"]["sha256"],
        "device": device,
        "dtype": dtype,
        "max_tokens": options.base.max_tokens,
        **adapted,
    }


def prompt_parts(options: RunConfig, instruction: str) -> dict[str, Any]:
    """What decides the text of prompts besides the items, for cache keys."""
    # The tiny model has no chat template.
    left_out = {"history_index", *(("chat",) if options.base.model == "tiny" else ())}
    parts: dict[str, Any] = {"prompt": options.prompt.model_dump(exclude=left_out)}
    if options.prompt.style == "published":
        parts |= {"instruction": instruction, "layout": LAYOUT}
    if options.prompt.history_items:
        index = _index(options)
        parts["retrieval"] = [history.VERSION, *index] if index else history.VERSION
    return parts


def _index(options: RunConfig) -> list[str]:
    """What decides neighbours besides the items, for cache keys: nothing where texts do."""
    index = options.prompt.history_index
    return [] if index == "text" else [index]


def model_name(options: RunConfig) -> str:
    """The base model's name for adapters' metadata: a hub id, or a folder's name, never a path."""
    folder = Path(options.base.model).expanduser()
    return folder.resolve().name if folder.is_dir() else options.base.model


def base_folder(options: RunConfig, where: Store, base: dict[str, Any]) -> Path:
    """The model folder of a `base_model` result."""
    if options.base.model == "tiny":
        return where.open(base["ref"]).folder / "model"
    return find_model(options.base.model, base["value"]["revision"])


def _confirm(options: RunConfig, where: Store, base: dict[str, Any], folder: Path) -> None:
    """Raises InputError where a given model is not the one that the `base_model` result is of.

    It lies outside the store: another machine may have another one there, and anybody may change it
    while a run is under way.
    """
    if options.base.model == "tiny":
        return
    if where.hash_folder(folder, HUB_FILES) != base["value"]["sha256"]:
        raise InputError(
            f"base.model {options.base.model}: {folder} on {socket.gethostname()} is not the model "
            "that this run began with; give every machine the same files and start the run again"
        )


def find_model(model: str, revision: str | None = None, weights: bool = True) -> Path:
    """A model folder: the one named, or the local snapshot of a Hugging Face id (fetched once).

    `revision` pins the snapshot, so that a run keeps the weights it began with. Without `weights`
    all but these is fetched. Raises InputError when there is neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(f"base.model {model}: there is no such folder, and it is no hub id")
    from huggingface_hub import snapshot_download

    try:
        wanted = [name for name in HUB_FILES if weights or not name.endswith(".safetensors")]
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(
            f"base.model {model}: neither a folder nor a model the hub gives "
            f"({type(error).__name__}: {why}); check the id, the network and HF_TOKEN"
        ) from error


def _device(options: RunConfig) -> str:
    if options.compute.device != "auto":
        return options.compute.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _external(options: RunConfig, where: Store) -> Piece:
    folder = find_model(options.base.model)
    from tasks.lora.base import whole_model

    if not (folder / "config.json").exists():
        raise InputError(
            f"base.model {options.base.model}: {folder} has no config.json; give a folder with "
            "config.json, a tokenizer and safetensors weights"
        )
    whole_model(folder)
    content = where.hash_folder(folder, HUB_FILES)
    given = Path(options.base.model).expanduser()
    # A snapshot's folder is named by its commit.
    revision = None if given.is_dir() else folder.name

    def check(_out: Path) -> dict[str, Any]:
        from tasks.lora.base import check_causal, load_base

        use_threads(options)
        with gpu_slot():
            loaded = load_base(
                folder,
                max_tokens=options.base.max_tokens,
                device=options.compute.device,
                dtype=options.base.dtype,
            )
            check_causal(loaded)
        return {
            "model": loaded.model.config.model_type,
            "parameters": loaded.model.num_parameters(),
            "sha256": content,
            "revision": revision,
        }

    key = digest({"version": VERSION, "external": content, "revision": revision})
    return noted(options, where, where.get("base_model", key, check), folder)

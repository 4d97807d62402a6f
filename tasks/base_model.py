"""Stage 2: the frozen base model. `tiny` is trained on the base users, others are as given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.artifacts import Piece, Ref, Store, digest, library_versions
from tasks.config import RunConfig
from tasks.errors import InputError
from tasks.prepare import users_of
from tasks.questions import profile_questions
from tasks.stage import Progress, gpu_slot, stage, store

VERSION = 1
# The libraries that decide the numbers of every stage that runs the model.
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "safetensors")
# Weights other than safetensors are never fetched: they could be pickles.
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@stage(name="base-model", tags=["gpu"])
def base_model(config: dict[str, Any], lamp_task: str, prepared: dict[str, Any]) -> Piece:
    """The base model: a folder `model` in the store (`tiny`), or the hash of the model given."""
    options = RunConfig.model_validate(config)
    where = store()
    if options.base.model != "tiny":
        return _external(options, where)
    key = digest(
        {
            "version": VERSION,
            "libraries": library_versions(LIBRARIES),
            "lamp_task": lamp_task,
            "users": prepared["value"]["sha256"]["base"],
            "instruction": prepared["value"]["instruction"],
            "prompt": options.prompt.model_dump(),
            "tiny": options.base.tiny.model_dump(),
            "max_tokens": options.base.max_tokens,
            "seed": options.seed,
        }
    )

    def make(out: Path) -> dict[str, Any]:
        from tasks.lora.base import pick_device
        from tasks.lora.tiny import train_tiny

        use_threads(options)
        tiny = options.base.tiny
        questions = [
            (sample.prompt, sample.answer)
            for user in users_of(where, prepared, "base")
            for sample in profile_questions(
                options, lamp_task, prepared["value"]["instruction"], user["profile"]
            )
        ]
        if not questions:
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
            )
        return {
            "model": "tiny",
            "questions": len(questions),
            "losses": trained.losses,
            "tokens": trained.tokens,
            "truncated": trained.truncated,
        }

    return where.get("base_model", key, make)


def load(options: RunConfig, where: Store, ref: Ref) -> Any:
    """The loaded base model (`tasks.lora.base.Base`) of a `base_model` result's reference."""
    from tasks.lora.base import load_base

    use_threads(options)
    return load_base(
        base_folder(options, where, ref),
        max_tokens=options.base.max_tokens,
        device=options.compute.device,
        dtype=options.base.dtype,
        gradient_checkpointing=options.base.gradient_checkpointing,
    )


def use_threads(options: RunConfig) -> None:
    """Set torch's CPU threads for this process, by `compute.threads`."""
    import os

    import torch

    chosen = options.compute.threads or (1 if options.base.model == "tiny" else os.cpu_count() or 1)
    torch.set_num_threads(chosen)


def model_parts(options: RunConfig, ref: Ref) -> dict[str, Any]:
    """What a stage that runs the base model depends on, for its cache key."""
    return {
        "libraries": library_versions(LIBRARIES),
        "base": ref["sha256"],
        "dtype": _dtype(options),
        "max_tokens": options.base.max_tokens,
        "prompt": options.prompt.model_dump(),
        "seed": options.seed,
    }


def base_folder(options: RunConfig, where: Store, ref: Ref) -> Path:
    """The model folder of a `base_model` result's reference."""
    if options.base.model == "tiny":
        return where.open(ref).folder / "model"
    return find_model(options.base.model)


def find_model(model: str) -> Path:
    """A model folder: the one named, or the local snapshot of a Hugging Face id (fetched once).

    Raises InputError when there is neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(f"base.model {model}: there is no such folder, and it is no hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(
            f"base.model {model}: neither a folder nor a model the hub gives "
            f"({type(error).__name__}: {why}); check the id, the network and HF_TOKEN"
        ) from error


def _dtype(options: RunConfig) -> str:
    if options.base.dtype != "auto":
        return options.base.dtype
    if options.compute.device == "cpu":
        return "float32"
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"


def _external(options: RunConfig, where: Store) -> Piece:
    folder = find_model(options.base.model)
    for needed in ("config.json", "*.safetensors"):
        if not any(folder.glob(needed)):
            raise InputError(
                f"base.model {options.base.model}: {folder} has no {needed}; give a folder with "
                "config.json, a tokenizer and safetensors weights (pickled weights are not read)"
            )
    content = where.hash_folder(folder)

    def check(_out: Path) -> dict[str, Any]:
        from transformers import AutoConfig, AutoTokenizer

        try:
            name = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            raise InputError(
                f"base.model {options.base.model}: config or tokenizer cannot be loaded "
                f"({' '.join(str(error).split())[:200]})"
            ) from error
        return {"model": name, "sha256": content}

    key = digest({"version": VERSION, "external": content})
    return where.get("base_model", key, check)

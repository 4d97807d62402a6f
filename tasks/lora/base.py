"""The frozen base model: any `AutoModelForCausalLM` folder, loaded without executing its code."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.errors import InputError

# A progress bar and a warning per load drown the log of hundreds of jobs; the warning is about a
# property that PEFT 0.21 reads and transformers 5 renames.
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


@dataclass(frozen=True)
class Base:
    """A loaded base model and its tokenizer.

    `max_tokens` bounds prompt plus answer (tokens). The model is in eval mode and frozen.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    max_tokens: int


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one. Raises InputError for `cuda` without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "compute.device: cuda was asked for, but torch sees no GPU; use auto or cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def load_base(
    folder: Path,
    *,
    max_tokens: int,
    device: str = "auto",
    dtype: str = "auto",
    gradient_checkpointing: bool = False,
) -> Base:
    """Load the model in `folder` frozen.

    Only safetensors weights are read, and no code that a checkpoint brings is run.
    Raises InputError when the folder holds no model that transformers can load this way.
    """
    where = pick_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=pick_dtype(dtype, where), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"base.model {folder}: cannot be loaded ({reason}); "
            "give a folder or id with config.json, tokenizer and safetensors weights"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"base.model {folder}: its tokenizer has no end-of-text token; set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to(where).requires_grad_(False)
    model.config.use_cache = True
    if gradient_checkpointing:
        # Non-reentrant: gradients must reach the LoRAs although the embeddings are frozen.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Base(model.eval(), tokenizer, where, max_tokens)

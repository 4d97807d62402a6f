"""The frozen base model: any `AutoModelForCausalLM` folder, loaded without executing its code."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tasks.errors import InputError

# A progress bar and a warning per load drown the log of hundreds of jobs; the warning is about a
# property that PEFT 0.21 reads and transformers 5 renames.
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

_LOADING = threading.Lock()
# Positions kept free for an answer where the model has only so many.
ANSWER_ROOM = 64


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
    """Load the model in `folder` frozen, without dropout, and set to answer greedily.

    Only safetensors weights are read, and no code that a checkpoint brings is run. `max_tokens` is
    lowered to what the model has positions for.
    Raises InputError when the folder holds no whole model that transformers can load this way.
    """
    where = pick_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            _without_dropout(part)
        # While it loads, transformers changes the default dtype of the whole process.
        with _LOADING:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=pick_dtype(dtype, where),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"base.model {folder}: cannot be loaded ({reason}); "
            "give a folder or id with config.json, tokenizer and safetensors weights"
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        # transformers would fill them with random numbers, others at each load.
        few = ", ".join(sorted(report["missing_keys"])[:3])
        raise InputError(
            f"base.model {folder}: its weights lack {few}; give a whole causal language model"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(f"base.model {folder}: its tokenizer has no end-of-text token; set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config = _greedy(model.generation_config, tokenizer)
    model.to(where).requires_grad_(False)
    model.config.use_cache = True
    if gradient_checkpointing:
        # Non-reentrant: gradients must reach the LoRAs although the embeddings are frozen.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or max_tokens + ANSWER_ROOM
    return Base(model.eval(), tokenizer, where, max(8, min(max_tokens, positions - ANSWER_ROOM)))


def _without_dropout(config: Any) -> None:
    """Set every dropout of the configuration to 0: training must be the same every time."""
    for name, value in list(vars(config).items()):
        if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
            setattr(config, name, 0.0)


def _greedy(given: GenerationConfig | None, tokenizer: Any) -> GenerationConfig:
    """Greedy decoding and nothing else of the checkpoint's own settings but where a turn ends.

    Sampling, penalties and least lengths would change the answers; LaMP's are greedy.
    """
    own = getattr(given, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return GenerationConfig(
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )

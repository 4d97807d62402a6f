"""The base model without its weights: its shape, and its tokenizer where that is at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoTokenizer, LlamaConfig

from tasks.base_model import find_model
from tasks.config import RunConfig
from tasks.errors import InputError
from tasks.lora.base import Base, attention_only, end_of_turn, most_tokens, without_weights
from tasks.lora.cost import ModelShape, shape_of
from tasks.lora.grouped import Shapes, shapes_of
from tasks.lora.tiny import tiny_config
from tasks.options import PlanOptions, TrainingOptions

# Numbers of the models' own config.json, for where the hub does not answer.
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
}
# Text encoders: parameters without the table of embeddings, which is looked up.
KNOWN_ENCODERS = {
    # 12 layers of width 384 and 1536; 24 of width 1024 and 4096.
    "BAAI/bge-small-en-v1.5": 12 * (4 * 384 * 384 + 2 * 384 * 1536),
    "microsoft/deberta-v3-large": 24 * (4 * 1024 * 1024 + 2 * 1024 * 4096),
}
ENCODER_TOKENS = 512


@dataclass(frozen=True)
class Planned:
    """A model that is not loaded: `model` on torch's meta device, `base` with its tokenizer.

    each: bytes per number of its weights. gpu: whether the plan is for a GPU. notes: what of this
    is assumed.
    """

    model: Any
    shape: ModelShape
    base: Base | None
    max_tokens: int
    each: int
    gpu: bool
    machine: PlanOptions
    notes: list[str]

    @property
    def weights(self) -> int:
        """Bytes of the weights in memory."""
        return self.each * self.shape.parameters

    def lora(self, how: TrainingOptions) -> Shapes:
        return shapes_of(self.model, how.target_modules, how.rank)


def planned(options: RunConfig) -> Planned:
    """What can be known of `base.model` without its weights.

    Raises InputError when neither a folder, nor the hub, nor this module knows it.
    """
    import torch

    notes: list[str] = []
    config, folder = _config(options, notes)
    attention_only(options.base.model, config)
    gpu = options.compute.device != "cpu"
    dtype = options.base.dtype
    each = 2 if dtype == "bfloat16" or (dtype == "auto" and gpu) else 4
    model = without_weights(config)
    most = most_tokens(config, options.base.max_tokens)
    if options.base.quantisation != "none":
        notes.append(
            f"base.quantisation {options.base.quantisation}: answers are planned as without it"
        )
    tokenizer = _tokenizer(folder, options.prompt.chat, notes)
    base = None
    if tokenizer is not None:
        base = Base(model, tokenizer, torch.device("cpu"), most, end_of_turn(tokenizer))
    return Planned(model, shape_of(model), base, most, each, gpu, options.plan, notes)


def encoder_size(options: RunConfig, notes: list[str]) -> int:
    """Parameters of the text encoder that each token passes; 0, and a note, where not known."""
    import torch

    name = options.anchors.text_model
    try:
        folder = find_model(name, weights=False)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModel.from_config(config, trust_remote_code=False)
    except (InputError, OSError, ValueError) as error:
        if name in KNOWN_ENCODERS:
            return KNOWN_ENCODERS[name]
        why = " ".join(str(error).split())[:120]
        notes.append(f"anchors.text_model {name} is not at hand ({why}): its work is not counted")
        return 0
    return sum(i * o for i, o in shapes_of(model, "all-linear", 1).sizes.values())


def _config(options: RunConfig, notes: list[str]) -> tuple[Any, Path | None]:
    """The model's configuration, and the folder it came from, if any."""
    name = options.base.model
    if name == "tiny":
        tiny = options.base.tiny
        notes.append(
            f"the tiny model's vocabulary is taken to be base.tiny.max_vocabulary "
            f"{tiny.max_vocabulary}, the most that it may be: it is known once the model is trained"
        )
        sizes = (tiny.hidden, tiny.layers, tiny.heads, tiny.max_vocabulary)
        return tiny_config(*sizes, options.base.max_tokens), None
    try:
        folder = find_model(name, weights=False)
        return AutoConfig.from_pretrained(folder, trust_remote_code=False), folder
    except (InputError, OSError, ValueError) as error:
        if name in KNOWN_MODELS and not Path(name).expanduser().is_dir():
            notes.append(f"{name} is not at hand: its shape is as this project knows it")
            return LlamaConfig(**KNOWN_MODELS[name]), None
        if isinstance(error, InputError):
            raise
        why = " ".join(str(error).split())[:200]
        raise InputError(f"base.model {name}: its config.json cannot be read ({why})") from error


def _tokenizer(folder: Path | None, chat: str, notes: list[str]) -> Any:
    if folder is None:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = " ".join(str(error).split())[:120]
        notes.append(f"{folder.name} has no tokenizer that can be read ({why})")
        return None
    if tokenizer.eos_token_id is None:
        raise InputError(f"base.model {folder}: its tokenizer has no end-of-text token; set one")
    if chat == "never":
        tokenizer.chat_template = None
    return tokenizer

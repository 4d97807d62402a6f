"""The base model without its weights: its shape, and its tokenizer where that is at hand."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from tasks.base_model import GivenModel
from tasks.config.options import BaseOptions, PlanOptions, TrainingOptions
from tasks.config.run import RunConfig
from tasks.errors import InputError, short
from tasks.lora.base import Base, attention_only, end_of_turn, most_tokens, without_weights
from tasks.lora.grouped import Shapes, shapes_of
from tasks.lora.tiny import tiny_config
from tasks.results import models
from tasks.text.encoder import Encoder
from tasks.text.loading import find_model

# Numbers of the models' own config.json, for where the hub does not answer.
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
    }
}  # fmt: skip
# English prose has 4 to 4.5 characters per token of a vocabulary like Llama's: this counts more.
CHARACTERS_PER_TOKEN = 4
# A chat template's own tokens, and those that open and close a text.
AROUND = 16
NOT_LOADED = models.Base(model="", content="", dtype="float32", max_tokens=0)
# In place of functions that look at a model or at results.
UNSEEN: dict[str, Callable[..., Any]] = {
    "log": lambda *_, **__: None,
    "coverage_lines": lambda *_: (),
    "identified": lambda model: GivenModel(model=model, content="", revision=None),
    "encoder_of": lambda model: Encoder(model=model, content="", libraries={}),
}


class Characters:
    """Stands for a tokenizer that is not at hand: a token per CHARACTERS_PER_TOKEN characters."""

    chat_template = bos_token_id = None
    eos_token_id = 0

    def __call__(
        self, text: str, add_special_tokens: bool = True, **_: object
    ) -> dict[str, list[int]]:
        around = AROUND if add_special_tokens else 0
        return {"input_ids": [1] * (around + math.ceil(len(text) / CHARACTERS_PER_TOKEN))}


@dataclass(frozen=True)
class PlannedModel:
    """A model that is not loaded.

    base: the model on torch's meta device, with its tokenizer or `Characters`. parameters: tied
    ones count once. each: bytes per number of the weights. gpu: whether the plan is for a GPU.
    checkpointing: in training. notes: what of this is assumed. shapes: of LoRAs, by rank and
    layers.
    """

    base: Base
    parameters: int
    each: int
    gpu: bool
    checkpointing: bool
    machine: PlanOptions
    notes: list[str]
    shapes: dict[tuple[object, ...], Shapes] = field(default_factory=dict, compare=False)

    @property
    def weights(self) -> int:
        """Bytes of the weights in memory."""
        return self.each * self.parameters

    def lora(self, options: TrainingOptions) -> Shapes:
        """The shapes of a LoRA. Raises InputError where no layer is named as `target_modules`."""
        # Kept: every job asks, and the answer goes through all modules of the model.
        key = (options.rank, *options.target_modules)
        if key not in self.shapes:
            self.shapes[key] = shapes_of(self.base.model, options.target_modules, options.rank)
        return self.shapes[key]

    def seconds(self, flops: int) -> float:
        """An estimate for the machine."""
        return flops / (self.machine.peak_tflops * 1e12 * self.machine.mfu)


def plan_model(config: RunConfig) -> PlannedModel:
    """What can be known of `base.model` without its weights.

    Raises InputError where neither a folder, nor the hub, nor this module knows it.
    """
    options, notes = config.base, list[str]()
    shape, tokenizer = _shape_and_tokenizer(options, notes)
    if tokenizer is None:
        notes.append(f"no tokenizer at hand: tokens are characters / {CHARACTERS_PER_TOKEN}")
        tokenizer = Characters()
    if config.prompt.chat == "never":
        tokenizer.chat_template = None
    attention_only(options.model, shape)
    gpu = config.compute.device != "cpu"
    narrow = options.dtype == "bfloat16" or (options.dtype == "auto" and gpu)
    if options.quantisation != "none":
        notes.append(f"base.quantisation {options.quantisation}: answers are planned without it")
    model, most = without_weights(shape), most_tokens(shape, options.max_tokens)
    base = Base(model, tokenizer, torch.device("cpu"), most, end_of_turn(tokenizer))
    each, checkpointing = 2 if narrow else 4, options.gradient_checkpointing
    count = model.num_parameters()
    return PlannedModel(base, count, each, gpu, checkpointing, config.plan, notes)


def _shape_and_tokenizer(options: BaseOptions, notes: list[str]) -> tuple[Any, Any]:
    """A model's configuration, and its tokenizer if it can be read."""
    name, tiny = options.model, options.tiny
    if name == "tiny":
        notes.append(
            f"the tiny model's vocabulary is taken to be base.tiny.max_vocabulary "
            f"{tiny.max_vocabulary}, the most that it may be: it is known once the model is trained"
        )
        sizes = (tiny.hidden, tiny.layers, tiny.heads, tiny.max_vocabulary)
        return tiny_config(*sizes, options.max_tokens), None
    try:
        folder = find_model(name, weights=False)
        shape = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (InputError, OSError, ValueError) as error:
        if name in KNOWN_MODELS:
            notes.append(f"{name} is not at hand: its shape is as this project knows it")
            return LlamaConfig(**KNOWN_MODELS[name]), None
        if isinstance(error, InputError):
            raise
        why = short(error)
        raise InputError(f"base.model {name}: its config.json cannot be read ({why})") from error
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):
        return shape, None
    if tokenizer.eos_token_id is None:
        raise InputError(f"base.model {folder}: its tokenizer has no end-of-text token; set one")
    return shape, tokenizer

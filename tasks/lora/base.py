"""The frozen base model: any `AutoModelForCausalLM` folder, loaded without executing its code."""

import threading
import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tasks.errors import InputError, short
from tasks.lora.kernels import use_kernels

# These lines come at each load, in hundreds of jobs. (PEFT 0.21 reads what transformers 5 renamed.)
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

_LOADING = threading.Lock()
# Positions that a prompt leaves to the answer, of those that the model has.
ANSWER_ROOM = 64
# The `layer_types` that packing and padding are right for.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
# An answer to any question, to see what a chat template writes after it.
_ANSWER = "the answer of the assistant"
# Suffixes of files whose code torch, joblib or pickle would execute on loading.
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_DECODERS = "decoders whose layers all are attention (Llama, Qwen, Mistral, Gemma, ...)"


@dataclass(frozen=True)
class Base:
    """A frozen base model in eval mode, and its tokenizer.

    max_tokens: the most of prompt and answer together. end: the token that ends an answer; None:
    end of text. adapter_dtype: of the LoRAs' products; None: the LoRAs' own. end_to_end: whether
    attention takes samples laid end to end (tasks/lora/kernels.py).
    """

    model: Any
    tokenizer: Any
    device: torch.device
    max_tokens: int
    end: int | None = None
    adapter_dtype: torch.dtype | None = None
    end_to_end: bool = False

    @property
    def end_of_answer(self) -> int:
        end: int = self.tokenizer.eos_token_id if self.end is None else self.end
        return end


def load_base(
    folder: Path,
    *,
    max_tokens: int,
    device: str = "auto",
    dtype: str = "auto",
    adapter_dtype: str = "auto",
    gradient_checkpointing: bool = False,
    chat: str = "auto",
    quantisation: str = "none",
) -> Base:
    """Load the model in `folder`: frozen, without dropout, set to answer greedily.

    Only safetensors weights are read; no code of a checkpoint is run. `max_tokens` is lowered to
    what the model's positions hold. chat "never": no chat template. quantisation "nf4": all linear
    layers but the output embedding in 4 bits. Raises InputError for anything but a whole model
    whose layers all are attention.
    """
    whole_model(folder)
    target = pick_device(device)
    quantised = {} if quantisation == "none" else nf4(target)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = _model(folder, pick_dtype(dtype, target), quantised)
    except (torch.OutOfMemoryError, InputError):
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"base.model {folder}: cannot be loaded ({short(error, 300)}); "
            "give a folder or id with config.json, tokenizer and safetensors weights"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"base.model {folder}: its tokenizer has no end-of-text token; set one")
    if chat == "never":
        tokenizer.chat_template = None
    if gradient_checkpointing:
        # Non-reentrant: gradients must reach the LoRAs although the embeddings are frozen.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return as_base(model, tokenizer, target, max_tokens, adapter_dtype)


def as_base(
    model: Any, tokenizer: Any, device: torch.device, max_tokens: int, adapter_dtype: str = "auto"
) -> Base:
    """The Base of a model in memory: moved to `device`, frozen, set to answer greedily."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    end = end_of_turn(tokenizer)
    model.generation_config = _greedy(model.generation_config, tokenizer, end)
    model.to(device).requires_grad_(False)
    end_to_end = use_kernels(model)
    model.config.use_cache = True
    low = pick_adapter_dtype(adapter_dtype, device, model.dtype)
    most = most_tokens(model.config, max_tokens)
    return Base(model.eval(), tokenizer, device, most, end, low, end_to_end)


def _model(folder: Path, dtype: torch.dtype, quantised: dict[str, Any]) -> Any:
    """Load the model of a folder. Raises InputError if weights are missing."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    attention_only(str(folder), config)
    # Without dropout training is the same every time.
    for part in (config, config.get_text_config()):
        floats = [name for name, value in vars(part).items() if isinstance(value, float)]
        vars(part).update({name: 0.0 for name in floats if "dropout" in name or "pdrop" in name})
    # While it loads, transformers changes the default dtype of the whole process.
    with _LOADING:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, **quantised,
        )  # fmt: skip
    model, report = loaded
    if report["missing_keys"]:
        # transformers would fill them with random numbers, different ones at each load.
        few = ", ".join(sorted(report["missing_keys"])[:3])
        raise InputError(
            f"base.model {folder}: its weights lack {few}; give a whole causal language model"
        )
    return model


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU, else the CPU. Raises InputError for `cuda` without a GPU."""
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


def pick_adapter_dtype(name: str, device: torch.device, base: torch.dtype) -> torch.dtype | None:
    """`auto` is bfloat16 if the base is bfloat16 on a GPU, else None: the LoRAs' own float32."""
    narrow = device.type == "cuda" and base == torch.bfloat16
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and narrow) else None


def attention_only(model: str, config: Any) -> None:
    """Raises InputError unless all layers of a model are attention, and of one size.

    A recurrent layer carries its state across padding, and from one sample of a row to the next.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - _ATTENTION
    if config.is_encoder_decoder:
        why = "has an encoder"
    elif getattr(text, "is_heterogeneous", False):
        why = "has layers of unlike sizes"
    elif kinds:
        why = f"has layers of the kind {sorted(kinds)[0]}"
    elif not getattr(text, "num_attention_heads", None):
        why = "has no attention heads"
    else:
        return
    raise InputError(
        f"base.model {model}: its architecture, {config.model_type}, {why}; this works with "
        f"{_DECODERS}: give another"
    )


@torch.no_grad()
def check_causal(base: Base) -> None:
    """Raises InputError if a token's logits depend on the tokens after it.

    transformers also loads an encoder (BERT) as a language model. No field of the configuration
    tells it from a decoder: a decoder, too, may say `is_decoder` false (GPT-NeoX).
    """
    ids = torch.tensor([[0, 0, 0], [0, 1, 1]], device=base.device)
    logits = base.model(input_ids=ids, use_cache=False).logits[:, 0]
    one, other = logits.float()
    # Larger than rounding errors, smaller than what another token changes.
    rounding = 1e-4 if logits.dtype == torch.float32 else 0.02
    if (one - other).abs().max() > rounding * one.abs().max():
        raise InputError(
            f"base.model: {base.model.config.model_type} reads a text in both directions, so it "
            f"sees the answers it is asked for; this works with {_DECODERS}"
        )


def without_weights(config: Any) -> Any:
    """The model of a configuration on torch's meta device."""
    with torch.device("meta"):
        # With a dtype, transformers does not change the default dtype of the process.
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )


def most_tokens(config: Any, max_tokens: int) -> int:
    """`max_tokens`, or fewer if the model lacks positions for them and ANSWER_ROOM; at least 8."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or max_tokens + ANSWER_ROOM
    return max(8, min(max_tokens, positions - ANSWER_ROOM))


def whole_model(folder: Path) -> None:
    """Raises InputError if a folder has no safetensors weights, or is an adapter.

    For an adapter, transformers would load the model that it names, from anywhere.
    """
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"base.model {folder}: is an adapter (adapter_config.json), not a model; give the "
            "folder of a whole model"
        )
    if not any(folder.glob("*.safetensors")):
        weights = "none"
        if pickles := pickled_files(folder):
            weights = f"only pickled ones ({pickles[0].name}), which are never read"
        raise InputError(
            f"base.model {folder}: it needs *.safetensors weights and has {weights}; convert them "
            "with save_pretrained if you trust their source, or give another model"
        )


def pickled_files(folder: Path) -> list[Path]:
    """The files in a folder and its subfolders with a pickle's suffix, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICKLED)


def nf4(device: torch.device) -> dict[str, Any]:
    """Options of `from_pretrained` for a base in 4 bits (NF4: Dettmers et al. 2023, section 3).

    It computes in bfloat16, as the published code does. Raises InputError without bitsandbytes.
    """
    if not find_spec("bitsandbytes"):
        raise InputError(
            "base.quantisation: nf4 needs the extra `nf4` (pip install -e '.[nf4]'), or use none"
        )
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return {"quantization_config": config, "device_map": {"": device}}


def end_of_turn(tokenizer: Any) -> int:
    """The token that ends an answer: the first special one that the chat template writes after it.

    If there is none, it is the end-of-text token.
    """
    end: int = tokenizer.eos_token_id
    if not tokenizer.chat_template:
        return end
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template may refuse these turns by an error of any kind
        return end
    ids = tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"]
    return next((one for one in ids if one in special_tokens(tokenizer).values()), end)


@lru_cache(maxsize=8)
def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text and id of each special token: the named ones, and added ones marked as special."""
    added = tokenizer.added_tokens_decoder.items()
    marked = {token.content: number for number, token in added if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return marked | dict(named)


def _greedy(config: GenerationConfig | None, tokenizer: Any, end: int) -> GenerationConfig:
    """Greedy decoding, as in LaMP. Of the checkpoint's settings, only its end tokens are kept."""
    ends = getattr(config, "eos_token_id", None)
    ends = {end, tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    return GenerationConfig(
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )

"""What samples cost in a model: FLOPs by its parameters, bytes of memory by its widths."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tasks.lora.batches import Encoded


@dataclass(frozen=True)
class Widths:
    """Number of blocks; widths of states, feed-forward, all attention and all key-value heads."""

    blocks: int
    hidden: int
    wide: int
    attention: int
    kv: int


def widths_of(model: Any) -> Widths:
    """The widths that a model's configuration names, and the usual ones for those it does not."""
    config = model.config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    return Widths(
        blocks=config.num_hidden_layers,
        hidden=hidden,
        wide=max(hidden, getattr(config, "intermediate_size", None) or 4 * hidden),
        attention=heads * size,
        kv=(getattr(config, "num_key_value_heads", None) or heads) * size,
    )


def flops(
    model: Any, samples: Iterable[Encoded], loras: int = 0, backward: bool = False,
    checkpointing: bool = False,
) -> int:  # fmt: skip
    """FLOPs of these samples in a frozen model, which may be on torch's meta device.

    The forward pass takes 2 per token and parameter (Kaplan et al. 2020, arXiv 2001.08361, section
    2.1). The `loras` numbers of a user's LoRAs count as parameters, input embeddings do not. The
    output head counts for labels only. Attention over T tokens takes 4 T per token, block and unit
    of width (PaLM, arXiv 2204.02311, appendix B).

    backward: count the backward pass, too. It takes as many again, for frozen weights need no
    gradient, and twice as many for attention. checkpointing: it repeats the forward pass. All
    experts of a mixture count; padding, norms and activations do not.
    """
    looked_up, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    # Tied weights are one parameter.
    body: int = model.num_parameters() - sum(one.numel() for one in {looked_up, head}) + loras
    weights = squares = 0
    for one in samples:
        weights += body * one.length + head.numel() * one.labels
        squares += one.length**2
    widths, forward = widths_of(model), 2 if backward and checkpointing else 1
    attention = widths.blocks * widths.attention * squares
    return 2 * weights * (forward + backward) + 4 * attention * (forward + 2 * backward)


def position_bytes(widths: Widths, each: int, checkpointing: bool) -> int:
    """Bytes that training needs per position, with `each` bytes per number of the model.

    A block keeps: inputs (float32) and outputs of both norms; queries, keys, values and attention's
    output; gate, its activation, up and their product. With checkpointing only one block is kept,
    and every block's input. In both cases one feed-forward is at work, its LoRAs' sums in float32.
    """
    attention = 2 * widths.attention + 2 * widths.kv
    block = 8 * widths.hidden + each * (2 * widths.hidden + attention + 4 * widths.wide)
    blocks = widths.blocks
    kept = block + blocks * each * widths.hidden if checkpointing else blocks * block
    return kept + 8 * widths.wide


def gpu_positions(widths: Widths, each: int, checkpointing: bool, free: int) -> int:
    """Positions per micro-batch that take half of the `free` bytes of a GPU."""
    return max(512, int(0.5 * free / position_bytes(widths, each, checkpointing)))

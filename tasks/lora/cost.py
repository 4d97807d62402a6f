"""What work costs: FLOPs, bytes of memory and of disk, by formulas from the model's shape.

A *pass* is one micro-batch through the model; which passes some work takes is said in
`tasks/lora/passes.py`. FLOPs count a multiplication and an addition as two. Tests hold the sums to
torch's own counters of what was multiplied and allocated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from tasks.lora.forward import KNOWN_LAYERS, may_pack
from tasks.lora.grouped import Shapes, shapes_of

# The order in which a layer of ours is worked off: nothing before the first trained one needs a
# gradient of what went in.
_ORDER = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2}
_LAST = 3


@dataclass(frozen=True)
class Widths:
    """How many blocks a model has, and how wide: its states, its feed-forward, all attention heads
    together, all key-value heads together."""

    blocks: int
    hidden: int
    wide: int
    attention: int
    kv: int


@dataclass(frozen=True)
class ModelShape(Widths):
    """What of a causal language model decides its costs.

    sizes: (in, out) of every linear layer but the output embedding, whose own is `head`. known:
    the last layer is one that is computed at label positions only (tasks/lora/forward.py). packs:
    several samples may share a row.
    """

    parameters: int
    sizes: dict[str, tuple[int, int]]
    head: tuple[int, int]
    known: bool
    packs: bool

    def place(self, layer: str) -> tuple[int, int]:
        """(block, order within the block) of a layer."""
        found = re.search(r"\.(\d+)\.", layer)
        return int(found[1]) if found else 0, _ORDER.get(layer.rpartition(".")[2], _LAST)

    def late(self, layer: str) -> bool:
        """Whether the layer follows the last attention."""
        block, order = self.place(layer)
        return self.known and block == self.blocks - 1 and order > 0


@dataclass(frozen=True)
class Pass:
    """`users` x `rows` rows of `width` positions each; `picked` positions (labels, filled up) go on
    after the last attention, `labels` through the output embedding."""

    users: int
    rows: int
    width: int
    picked: int
    labels: int

    @property
    def positions(self) -> int:
        return self.users * self.rows * self.width


@dataclass(frozen=True)
class Loras:
    """LoRAs on the model's layers: the one that is trained, and the rank of a frozen one below.

    below: layer -> rank. checkpointing: the forward pass is computed again in the backward pass.
    """

    trained: Shapes | None = None
    below: dict[str, int] | None = None
    checkpointing: bool = False

    def ranks(self, layer: str) -> tuple[int, int]:
        """(frozen, trained) rank on a layer."""
        own = self.trained.rank if self.trained and layer in self.trained.sizes else 0
        return (self.below or {}).get(layer, 0), own


def shape_of(model: Any) -> ModelShape:
    """The shape of a model, which may be without weights (on torch's `meta` device)."""
    head = model.get_output_embeddings()
    layers: Any = getattr(model.base_model, "layers", None) or []
    return ModelShape(
        **vars(widths_of(model)),
        parameters=model.num_parameters(),
        sizes=shapes_of(model, "all-linear", 1).sizes,
        head=(head.weight.shape[1], head.weight.shape[0]),
        known=len(layers) > 0 and type(layers[-1]).__name__ in KNOWN_LAYERS,
        packs=may_pack(model),
    )


def widths_of(model: Any) -> Widths:
    """The widths that a model's configuration names, and the usual ones where it names none."""
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


def forward_flops(shape: ModelShape, done: Pass, loras: Loras) -> int:
    """One forward pass: 2 i o per position and layer of i inputs and o outputs, 2 (R + r)(i + o)
    for LoRAs of ranks R and r, 4 T^2 per row and attention width, 2 i o per label in the head."""
    total = 2 * shape.head[0] * shape.head[1] * done.labels
    for layer, (i, o) in shape.sizes.items():
        wide = sum(loras.ranks(layer))
        total += (2 * i * o + 2 * wide * (i + o)) * _positions(shape, done, layer, loras)
    return total + _attention(shape, done)


def training_flops(shape: ModelShape, done: Pass, loras: Loras) -> int:
    """Forward and backward pass for the LoRA that is trained. Per position and layer, backward:

        2 o (R + r)               G B
      + 2 i o + 2 i (R + r)       gradient of x: G W + (G B) A
      + 2 r (i + o)               gradients of A and B of the trained LoRA

    Layers before the first trained one need no gradient of x; attention's backward pass is five
    products for the forward pass's two (its scores are computed again). Not counted: what works
    element by element.
    """
    if loras.trained is None:
        raise ValueError("training needs a LoRA to train")
    first = min(shape.place(layer) for layer in loras.trained.sizes)
    if loras.checkpointing:
        # There transformers lets gradients reach the embeddings, or nothing would be recomputed.
        first = (-1, 0)
    total = forward_flops(shape, done, loras)
    if loras.checkpointing:
        again = Pass(done.users, done.rows, done.width, done.positions, 0)
        total += forward_flops(shape, again, loras)
    total += 2 * shape.head[0] * shape.head[1] * done.labels
    for layer, (i, o) in shape.sizes.items():
        frozen, own = loras.ranks(layer)
        each = 2 * o * (frozen + own) + 2 * own * (i + o)
        if shape.place(layer) > first:
            each += 2 * i * o + 2 * i * (frozen + own)
        elif not own:
            each = 0
        total += each * _positions(shape, done, layer, loras)
    through = shape.blocks - max(0, first[0]) - (1 if first[1] else 0)
    return total + _attention(shape, done) * 5 // 2 * through // shape.blocks


def linear_flops(shape: ModelShape, loras: Loras, tokens: int, labels: int) -> int:
    """Of `training_flops` what does not depend on the company: `tokens` positions, no attention."""
    done = Pass(1, 1, tokens, labels, labels)
    return training_flops(replace(shape, attention=0), done, loras)


def _positions(shape: ModelShape, done: Pass, layer: str, loras: Loras) -> int:
    whole = loras.checkpointing and loras.trained is not None
    return done.picked if shape.late(layer) and not whole else done.positions


def _attention(shape: ModelShape, done: Pass) -> int:
    """Both products of every row with itself, the masked half too, as torch counts them."""
    return 4 * shape.blocks * shape.attention * done.users * done.rows * done.width**2


def decode_flops(shape: ModelShape, rows: int, prompt: int, new: int, loras: Loras) -> int:
    """Greedy answers of `new` tokens to `rows` prompts of `prompt` positions, keys and values kept.

    The head sees one position per row and token.
    """
    first = Pass(1, rows, prompt, rows * prompt, rows)
    total = forward_flops(shape, first, loras)
    later = rows * (new - 1)
    for layer, (i, o) in shape.sizes.items():
        total += (2 * i * o + 2 * sum(loras.ranks(layer)) * (i + o)) * later
    seen = (new - 1) * prompt + new * (new - 1) // 2
    total += 4 * shape.blocks * shape.attention * rows * seen
    return total + 2 * shape.head[0] * shape.head[1] * later


# --- memory ---------------------------------------------------------------------------------------


def position_bytes(widths: Widths, each: int, checkpointing: bool) -> int:
    """Bytes that training needs per position, with `each` bytes per number of the model.

    The backward pass keeps of every block the inputs of both norms (float32) and what they give;
    queries, keys, values and what attention gives; gate, its activation, up and their product.
    With checkpointing it keeps the input of every block, and one block like that. One feed-forward
    is at work; with a narrow dtype its LoRAs' sums are in float32.
    """
    attention = 2 * widths.attention + 2 * widths.kv
    block = 8 * widths.hidden + each * (2 * widths.hidden + attention + 4 * widths.wide)
    blocks = widths.blocks
    kept = block + blocks * each * widths.hidden if checkpointing else blocks * block
    return kept + 8 * widths.wide


def cpu_positions(widths: Widths) -> int:
    """Positions per micro-batch on a CPU, by the model's size alone, so the same every time.

    What one layer makes should stay near the size of the caches there: larger tensors are fresh
    pages for every operation, and those cost more than the arithmetic.
    """
    return max(512, min(16_384, 2**24 // (4 * widths.wide)))


def gpu_positions(widths: Widths, each: int, checkpointing: bool, free: int) -> int:
    """Positions per micro-batch that take half of the `free` bytes of a GPU."""
    return max(512, int(0.5 * free / position_bytes(widths, each, checkpointing)))


def training_bytes(shape: ModelShape, done: Pass, loras: Loras, each: int) -> int:
    """Memory of one forward and backward pass, beside weights, optimiser and the merged LoRAs."""
    if loras.trained is None:
        raise ValueError("training needs a LoRA to train")
    checkpointing = loras.checkpointing
    kept = done.positions * position_bytes(shape, each, checkpointing)
    if shape.known and not checkpointing:
        # After its attention the last block goes on with the labels' positions only.
        after = 4 * shape.hidden + each * (shape.hidden + 4 * shape.wide)
        kept -= (done.positions - done.picked) * after
    kept += 4 * done.positions * loras.trained.rank * len(loras.trained.sizes)
    # Logits in the model's dtype and in float32, their log-softmax and its gradient.
    kept += done.labels * shape.head[1] * (each + 12)
    below = sum(rank * sum(shape.sizes[name]) for name, rank in (loras.below or {}).items())
    # The users' LoRAs by layer and beside the frozen ones, which are copies as well; at the end
    # their gradients by layer and in one row, when nothing else is left.
    factors = 4 * done.users * 2 * (loras.trained.width + below)
    return factors + max(kept, 4 * done.users * 2 * loras.trained.width)


def optimiser_bytes(width: int, users: int) -> int:
    """The LoRAs of a job's users, their gradients and AdamW's two moments, in float32."""
    return 4 * 4 * width * users

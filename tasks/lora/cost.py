"""What a pass through the model costs: FLOPs, and bytes per position, from the model's shape.

A pass is one micro-batch; `tasks/lora/passes.py` says which passes some work takes. A
multiplication and an addition are two FLOPs. Tests hold the sums to torch's own counters. (Counting
on the meta device instead takes 2.5 s per pass of an 8B model, and a plan needs dozens.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tasks.lora.forward import last_layer, may_pack
from tasks.lora.grouped import Shapes
from tasks.lora.targets import target_layers

# The order of work within a block, the last are 3: nothing before the first trained layer needs a
# gradient.
_ORDER = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2}
NOTHING = Shapes({}, 1)
# Without a backward pass, batches hold so many times the positions of training.
BATCH_FACTOR = 4


@dataclass(frozen=True)
class Widths:
    """Number of blocks; widths of states, feed-forward, all attention and all key-value heads."""

    blocks: int
    hidden: int
    wide: int
    attention: int
    kv: int


@dataclass(frozen=True)
class ModelShape(Widths):
    """What decides the costs of a causal language model.

    sizes: (in, out) of every linear layer but the output embedding, `head`. known: the last block
    is computed at label positions only (tasks/lora/forward.py). packs: samples may share a row.
    """

    parameters: int
    sizes: dict[str, tuple[int, int]]
    head: tuple[int, int]
    known: bool
    packs: bool


@dataclass(frozen=True)
class Pass:
    """`users` x `rows` rows of `width` positions; `picked` of them (labels, filled up) go on after
    the last attention, `labels` go through the output embedding."""

    users: int
    rows: int
    width: int
    picked: int
    labels: int

    @property
    def positions(self) -> int:
        return self.users * self.rows * self.width


def shape_of(model: Any) -> ModelShape:
    """The shape of a model, which may be on torch's meta device."""
    head = model.get_output_embeddings()
    return ModelShape(
        **vars(widths_of(model)),
        parameters=model.num_parameters(),
        sizes=target_layers(model, "all-linear"),
        head=(head.weight.shape[1], head.weight.shape[0]),
        known=last_layer(model) is not None,
        packs=may_pack(model),
    )


def widths_of(model: Any) -> Widths:
    """The widths of a model's configuration, or the usual ones where it names none."""
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


class Flops:
    """FLOPs of passes through a model with LoRAs.

    Forward, per position and layer of i inputs and o outputs, with LoRAs of ranks R (frozen) and r
    (trained): 2 i o + 2 (R + r)(i + o). Backward, with the output's gradient G:

        2 o (R + r)               G B
      + 2 i o + 2 i (R + r)       gradient of x: G W + (G B) A; not before the first trained layer
      + 2 r (i + o)               gradients of the trained A and B

    Attention is two products of every row with itself, the masked half too, and five in its
    backward pass, which computes the scores again. Elementwise work is not counted.
    """

    def __init__(
        self,
        shape: ModelShape,
        trained: Shapes = NOTHING,
        below: Shapes = NOTHING,
        checkpointing: bool = False,
    ) -> None:
        self.shape, self.again = shape, checkpointing and bool(trained.sizes)
        # Per position: layers up to the last attention, and those after it.
        self.forth, self.back = [0, 0], [0, 0]
        first = min(map(_place, trained.sizes), default=(shape.blocks, 0))
        if self.again:
            # transformers then lets gradients reach the embeddings.
            first = (-1, 0)
        for layer, (i, o) in shape.sizes.items():
            own = trained.rank * (layer in trained.sizes)
            wide = own + below.rank * (layer in below.sizes)
            late = shape.known and _place(layer) > (shape.blocks - 1, 0)
            self.forth[late] += 2 * i * o + 2 * wide * (i + o)
            if own or _place(layer) > first:
                self.back[late] += 2 * o * wide + 2 * own * (i + o)
            if _place(layer) > first:
                self.back[late] += 2 * i * o + 2 * i * wide
        # Blocks whose attention gradients go through.
        self.through = shape.blocks - max(0, first[0]) - (1 if first[1] else 0)

    def forward(self, done: Pass) -> int:
        """One forward pass."""
        picked = done.positions if self.again else done.picked
        total = self.forth[0] * done.positions + self.forth[1] * picked
        return total + self._head(done.labels) + self.shape.blocks * self._attention(done)

    def training(self, done: Pass) -> int:
        """Forward and backward pass; with checkpointing all but the head is computed again."""
        picked = done.positions if self.again else done.picked
        total = self.forward(done) * (2 if self.again else 1)
        total += self.back[0] * done.positions + self.back[1] * picked
        # The gradient of the head's input; its own forward pass is not done again.
        total += 0 if self.again else self._head(done.labels)
        return total + self.through * self._attention(done) * 5 // 2

    def decode(self, done: Pass, new: int) -> int:
        """Greedy answers of `new` tokens to the prompts of a pass, with a cache."""
        rows = done.labels
        total = self.forward(done) + (sum(self.forth) + self._head(1)) * rows * (new - 1)
        seen = (new - 1) * done.width + new * (new - 1) // 2
        return total + 4 * self.shape.blocks * self.shape.attention * rows * seen

    def signature(self, done: Pass, sizes: tuple[int, int], at_input: bool) -> int:
        """What `item_signatures` of `sizes` (vocabulary, hidden) takes; at_input:
        `input_signatures`, whose gradient goes through all layers to the embeddings, to no weight.
        """
        (size_d, size_v), (vocabulary, hidden) = self.shape.head, sizes
        total = self.forward(done)
        labels = done.labels - done.rows  # the logits of a row's last position are not used
        if at_input:
            labels = done.positions
            total += total + 3 * self.shape.blocks * self._attention(done) // 2
        elif size_v > vocabulary:
            total += 2 * labels * size_v * vocabulary
        if size_d > hidden:
            total += 2 * labels * size_d * hidden
        return total + 2 * labels * min(size_v, vocabulary) * min(size_d, hidden)

    def _head(self, labels: int) -> int:
        return 2 * self.shape.head[0] * self.shape.head[1] * labels

    def _attention(self, done: Pass) -> int:
        """Of one block."""
        return 4 * self.shape.attention * done.users * done.rows * done.width**2


def _place(layer: str) -> tuple[int, int]:
    """(block, order within the block) of a layer."""
    number = re.search(r"\.(\d+)\.", layer)
    return int(number[1]) if number else 0, _ORDER.get(layer.rpartition(".")[2], 3)


def position_bytes(widths: Widths, each: int, checkpointing: bool) -> int:
    """Bytes that training needs per position, with `each` bytes per number of the model.

    Kept per block: inputs (float32) and outputs of both norms; queries, keys, values and what
    attention gives; gate, its activation, up and their product. With checkpointing: every block's
    input, and one block. Besides, one feed-forward is at work, with its LoRAs' sums in float32.
    """
    attention = 2 * widths.attention + 2 * widths.kv
    block = 8 * widths.hidden + each * (2 * widths.hidden + attention + 4 * widths.wide)
    blocks = widths.blocks
    kept = block + blocks * each * widths.hidden if checkpointing else blocks * block
    return kept + 8 * widths.wide


def cpu_positions(widths: Widths) -> int:
    """Positions per micro-batch on a CPU, by the model's size alone, so the same every time.

    A layer's output should stay near the size of the caches: larger tensors are fresh pages for
    every operation, which cost more than the arithmetic.
    """
    return max(512, min(16_384, 2**24 // (4 * widths.wide)))


def gpu_positions(widths: Widths, each: int, checkpointing: bool, free: int) -> int:
    """Positions per micro-batch that take half of the `free` bytes of a GPU."""
    return max(512, int(0.5 * free / position_bytes(widths, each, checkpointing)))


def forward_limit(positions: int, gpu: bool) -> int:
    """Positions per batch of log-likelihoods, from those of training.

    On a CPU a quarter, for the nearer cache: 3,685 items of the embedded model took 1.01 s in
    batches of 49,152, .76 s of 16,384 and .61 s of 4,096.
    """
    return BATCH_FACTOR * positions if gpu else max(512, positions // 4)

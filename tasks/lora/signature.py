"""The gradient signature: how a user answers, as one vector.

For an answer token y with last hidden state h and predicted probabilities p, the gradient of
log p(y) with respect to the LM head's weight is (onehot(y) - p) h^T [V, d]. Averaged over answer
tokens, then over items, it says in which direction the user pulls the model. A side that is larger
than asked is projected by a seeded Gaussian matrix. That keeps inner products in expectation
(Johnson-Lindenstrauss).

If all answers are a few words (two in LaMP-1), that gradient hardly depends on the question. The
gradient with respect to the input embeddings' weight [V, d] does. It takes a backward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from tasks.lora.base import Base
from tasks.lora.batches import Batch, Encoded, answer_logits, collate
from tasks.lora.group_train import default_positions
from tasks.lora.packing import micro_batches

# Tokens of a batch, padding included.
POSITIONS = 8192
STATE_POSITIONS = 16_384


@torch.no_grad()
def item_signatures(
    base: Base,
    samples: Sequence[Encoded],
    vocabulary: int,
    hidden: int,
    seed: int,
    positions: int = POSITIONS,
) -> Tensor:
    """Signature of each sample [N, D] (float32, CPU), D = min(V, vocabulary) * min(d, hidden).

    positions: the most of a batch, padding included.
    """
    head = base.model.get_output_embeddings()
    left = projection(head.weight.shape[0], vocabulary, seed, base.device)
    right = projection(head.weight.shape[1], hidden, seed + 1, base.device)
    seen: list[Tensor] = []

    def vectors(batch: Batch) -> Tensor:
        seen.clear()
        logits = answer_logits(base.model, batch).float()
        states = seen[0][:, -batch.keep : -1, :].float()
        labels, weight = _labels(batch)
        probabilities = logits.softmax(-1)
        if left is None:
            error = -probabilities
            error.scatter_add_(2, labels[..., None], torch.ones_like(error[..., :1]))
        else:
            error = left[labels] - probabilities @ left
        states = states if right is None else states @ right
        return torch.einsum("btv,btd,bt->bvd", error, states, weight)

    with head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0])):
        return _row_by_row(base, samples, positions, vectors)


def input_signatures(
    base: Base,
    samples: Sequence[Encoded],
    vocabulary: int,
    hidden: int,
    seed: int,
    positions: int | None = None,
) -> Tensor:
    """As `item_signatures`, by the gradient of the input embeddings' weight [V, d].

    positions: by default those of training, as there is a backward pass.
    """
    table = base.model.get_input_embeddings()
    left = projection(len(table.weight), vocabulary, seed, base.device)
    right = projection(table.weight.shape[1], hidden, seed + 1, base.device)
    if left is None:
        left = torch.eye(len(table.weight), device=base.device)

    def vectors(batch: Batch) -> Tensor:
        # The embeddings are frozen, so the gradient is taken of what is looked up in them.
        looked_up = table(batch.input_ids).detach().requires_grad_()
        with table.register_forward_hook(lambda _module, _ids, _out: looked_up):
            logits = answer_logits(base.model, batch).float()
        labels, weight = _labels(batch)
        log_p = logits.log_softmax(-1).gather(2, labels[..., None])[..., 0]
        (log_p * weight).sum().backward(inputs=[looked_up])
        gradient = cast(Tensor, looked_up.grad).float() * batch.attention_mask[..., None]
        gradient = gradient if right is None else gradient @ right
        return torch.einsum("btv,btd->bvd", left[batch.input_ids], gradient)

    return _row_by_row(base, samples, positions or default_positions(base), vectors)


@torch.no_grad()
def mean_states(base: Base, samples: Sequence[Encoded], positions: int = STATE_POSITIONS) -> Tensor:
    """The last hidden states of each prompt, averaged over its tokens: [N, d] (float32, CPU)."""

    def vectors(batch: Batch) -> Tensor:
        states = _states(base, batch).float()
        mask = batch.attention_mask[..., None]
        return (states * mask).sum(1) / mask.sum(1)

    return _row_by_row(base, samples, positions, vectors)


@contextmanager
def hooked(base: Base, names: Sequence[str], hook: Callable[..., Any]) -> Iterator[None]:
    """Call `hook(name, input, output)` after each of these layers; what it returns, if not None,
    becomes the layer's output."""
    with ExitStack() as stack:
        for name in names:

            def after(_: Any, x: tuple[Tensor, ...], out: Tensor, name: str = name) -> Any:
                return hook(name, x[0], out)

            stack.enter_context(base.model.get_submodule(name).register_forward_hook(after))
        yield


@torch.no_grad()
def mean_inputs(base: Base, names: Sequence[str], samples: Sequence[Encoded]) -> dict[str, Tensor]:
    """What enters each layer [in], averaged over all tokens of the samples (float32, CPU)."""
    tokens = sum(sample.length for sample in samples)
    sums: dict[str, Any] = dict.fromkeys(names, 0.0)

    def add(name: str, x: Tensor, _: Tensor) -> None:
        masked = x.float() * batch.attention_mask[..., None]
        sums[name] = sums[name] + masked.sum((0, 1)).cpu() / tokens

    with hooked(base, names, add):
        for _, batch in _batches(base, samples, STATE_POSITIONS):
            _states(base, batch)
    return sums


def projection(size: int, to: int, seed: int, device: torch.device | None = None) -> Tensor | None:
    """Gaussian [size, to] with variance 1/to, or None (identity) when `size <= to`."""
    if size <= to:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(size, to, generator=generator, dtype=torch.float32)
    return (drawn / float(to**0.5)).to(device)


def _batches(
    base: Base, samples: Sequence[Encoded], positions: int
) -> Iterator[tuple[list[int], Batch]]:
    """Samples of similar length, their numbers and batch; of at most so many positions."""
    for some in micro_batches([(1, one.length, one.length) for one in samples], positions):
        yield some, collate(base, [samples[i] for i in some])


def _row_by_row(
    base: Base, samples: Sequence[Encoded], positions: int, vectors: Callable[[Batch], Tensor]
) -> Tensor:
    """What `vectors` makes of each sample of a batch: [N, D] (CPU), in the samples' order."""
    order: list[int] = []
    made = []
    for some, batch in _batches(base, samples, positions):
        order += some
        made.append(vectors(batch).flatten(1).cpu())
    return torch.cat(made)[torch.tensor(order).argsort()]


def _states(base: Base, batch: Batch) -> Tensor:
    """The last hidden states [B, T, d] of a batch; the output embedding is not run."""
    output = base.model.base_model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    states: Tensor = output.last_hidden_state
    return states


def _labels(batch: Batch) -> tuple[Tensor, Tensor]:
    """The answers' tokens [B, T], 0 for none, and each one's weight in the mean over an answer."""
    labelled = batch.labels >= 0
    weight = labelled.float() / labelled.sum(1, keepdim=True).float()
    return batch.labels.clamp(min=0), weight

"""Answering for many users at once: greedy decoding, and likelihoods of given answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tasks.lora.base import Base
from tasks.lora.batches import Encoded, collate
from tasks.lora.forward import label_losses, may_pack, sum_by
from tasks.lora.group_train import default_positions
from tasks.lora.grouped import Layers, Part, assign, clear
from tasks.lora.packing import ONE_PER_ROW, footprint, layout, micro_batches, pack

# Users' numbers -> layer -> (frozen part, trained part) of those users; None: the bare base model.
Parts = Callable[[Sequence[int]], tuple[dict[str, Part] | None, dict[str, Part] | None]]


@torch.no_grad()
def answer_users(
    base: Base,
    layers: Layers,
    questions: Sequence[Sequence[Encoded]],
    parts: Parts,
    max_new_tokens: int,
    positions: int | None = None,
) -> list[list[str]]:
    """Greedy answers to each user's questions, users mixed in a batch, each with their own LoRA.

    A user has as many rows in a batch as the user with most questions in it, so users with equally
    many questions of like length go together; a user with very many is asked in pieces. A batch
    that does not fit in memory is halved.
    """
    limit = positions or 4 * default_positions(base)
    pieces: list[tuple[int, Sequence[Encoded]]] = []
    for user, own in enumerate(questions):
        longest = max((len(question.prompt) for question in own), default=0) + max_new_tokens
        size = max(1, limit // longest)
        pieces += [(user, own[start : start + size]) for start in range(0, len(own), size)]
    sizes = []
    for _, own in pieces:
        lengths = [len(question.prompt) + max_new_tokens for question in own]
        sizes.append((len(own), max(lengths), sum(lengths)))
    made: dict[int, list[str]] = {}
    queue = micro_batches(sizes, limit)
    while queue:
        batch = queue.pop(0)
        frozen, trained = parts([pieces[number][0] for number in batch])
        assign(layers, frozen=frozen, trained=trained)
        rows = max(sizes[number][0] for number in batch)
        filled: list[Encoded] = []
        for number in batch:
            own = pieces[number][1]
            # A row to fill up with repeats the user's first question; its answer is dropped.
            filled += [*own, *[own[0]] * (rows - len(own))]
        try:
            answers = _greedy(base, filled, max_new_tokens)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
            queue[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
            continue
        for place, number in enumerate(batch):
            made[number] = answers[place * rows : place * rows + sizes[number][0]]
    clear(layers)
    results: list[list[str]] = [[] for _ in questions]
    for number, (user, _) in enumerate(pieces):
        results[user] += made[number]
    return results


@torch.no_grad()
def log_likelihoods(
    base: Base,
    layers: Layers,
    samples: Sequence[Sequence[Encoded]],
    parts: Parts,
    positions: int | None = None,
) -> list[Tensor]:
    """Per user: log p(answer | prompt) of each of the user's samples [N_u] (float32, CPU)."""
    limit = positions or 4 * default_positions(base)
    present = [u for u, own in enumerate(samples) if own]
    rows = ONE_PER_ROW
    if may_pack(base.model):
        rows = layout([samples[u] for u in present])
    sizes = [footprint(samples[u], rows) for u in present]
    results: list[Tensor] = [torch.empty(0) for _ in samples]
    for part in micro_batches(sizes, limit):
        batch = [present[number] for number in part]
        packed = pack([samples[u] for u in batch], base.tokenizer.pad_token_id, rows)
        packed = packed.to(base.device)
        frozen, trained = parts(batch)
        assign(layers, frozen=frozen, trained=trained)
        counts = [len(samples[u]) for u in batch]
        sums = -sum_by(label_losses(base, packed), packed.sample, sum(counts)).cpu()
        for user, own in zip(batch, sums.split(counts), strict=True):
            results[user] = own
    clear(layers)
    return results


def evidence(
    base: Base,
    layers: Layers,
    samples: Sequence[Sequence[Encoded]],
    anchors: Sequence[dict[str, Part]],
    positions: int | None = None,
) -> Tensor:
    """[U, K]: log-likelihood of each user's items under each anchor's LoRA, summed over items.

    One pass over all users' items per anchor: each anchor's parts have U = 1, and all rows are
    that one "user's".
    """
    everything = [sample for own in samples for sample in own]
    owner = torch.tensor([u for u, own in enumerate(samples) for _ in own])
    chunk = positions or 4 * default_positions(base)
    table = torch.zeros(len(samples), len(anchors))
    for k, anchor in enumerate(anchors):
        scores: list[Tensor] = []
        for part in _chunks(everything, chunk):
            scores += log_likelihoods(base, layers, [part], partial(_alone, anchor))
        table[:, k] = sum_by(torch.cat(scores), owner, len(samples))
    return table


def _greedy(base: Base, questions: Sequence[Encoded], max_new_tokens: int) -> list[str]:
    """The greedy answer to each question, in one batch, without special tokens (`load_base`)."""
    batch = collate(base, [Encoded(question.prompt, []) for question in questions])
    output = base.model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=max_new_tokens,
    )
    texts = base.tokenizer.batch_decode(
        output[:, batch.input_ids.shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in texts]


def _alone(part: dict[str, Part], _users: Sequence[int]) -> tuple[dict[str, Part], None]:
    return part, None


def _chunks(samples: Sequence[Encoded], positions: int) -> list[list[Encoded]]:
    """Samples in order, in pieces of about `positions` tokens."""
    pieces: list[list[Encoded]] = [[]]
    used = 0
    for sample in samples:
        length = len(sample.prompt) + len(sample.answer)
        if pieces[-1] and used + length > positions:
            pieces.append([])
            used = 0
        pieces[-1].append(sample)
        used += length
    return pieces

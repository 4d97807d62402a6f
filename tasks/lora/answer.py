"""Answering for many users at once: greedy decoding, and likelihoods of given answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from tasks.errors import InputError
from tasks.lora.base import Base
from tasks.lora.batches import Encoded, collate
from tasks.lora.cost import BATCH_FACTOR, forward_limit
from tasks.lora.forward import label_losses, may_pack, sum_by
from tasks.lora.group_train import default_positions
from tasks.lora.grouped import Layers, Part, assign, clear
from tasks.lora.packing import ONE_PER_ROW, footprint, layout, micro_batches, pack

# Some of one user's samples.
Piece = tuple[int, slice]
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
    limit = positions or BATCH_FACTOR * default_positions(base)
    results = [[""] * len(own) for own in questions]

    def ask(batch: list[Piece]) -> None:
        frozen, trained = parts([user for user, _ in batch])
        assign(layers, frozen=frozen, trained=trained)
        given = [questions[user][span] for user, span in batch]
        rows = max(len(own) for own in given)
        # A row to fill up with repeats the user's first question; its answer is dropped.
        filled = [item for own in given for item in [*own, *[own[0]] * (rows - len(own))]]
        answers = _greedy(base, filled, max_new_tokens)
        for place, (user, span) in enumerate(batch):
            count = span.stop - span.start
            results[user][span] = answers[place * rows : place * rows + count]

    _work_off(layers, question_batches(questions, max_new_tokens, limit), ask)
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
    limit = positions or forward_positions(base)
    present = [own for own in samples if own]
    rows = layout(present) if may_pack(base.model) else ONE_PER_ROW
    results = [torch.empty(len(own)) for own in samples]

    def measure(batch: list[Piece]) -> None:
        found = _sums(base, layers, [(u, samples[u][s]) for u, s in batch], parts, rows)
        for (user, span), scores in zip(batch, found, strict=True):
            results[user][span] = scores

    _work_off(layers, sample_batches(samples, rows, limit), measure)
    return results


def likeliest(
    base: Base,
    layers: Layers,
    samples: Sequence[Sequence[Sequence[Encoded]]],
    parts: Parts,
    positions: int | None = None,
) -> list[list[int]]:
    """Per user and question: which of the question's answers has the largest log p (the first).

    `samples`: per user, per question, one sample per possible answer. The log-likelihood is that of
    the whole answer with its end, so no answer wins by being the start of another.
    """
    flat = [[sample for question in own for sample in question] for own in samples]
    scores = log_likelihoods(base, layers, flat, parts, positions)
    return [
        [int(one.argmax()) for one in found.split([len(question) for question in own])]
        for own, found in zip(samples, scores, strict=True)
    ]


def evidence(
    base: Base,
    layers: Layers,
    samples: Sequence[Sequence[Encoded]],
    anchors: Iterable[dict[str, Part]],
    positions: int | None = None,
    asked: Tensor | None = None,
) -> Tensor:
    """[U, K]: log-likelihood of each user's items under each anchor's LoRA, summed over items.

    One pass over the users' items per anchor: each anchor's parts have U = 1, and all rows are
    that one "user's". NaN where `asked` [U, K] (bool; all, if not given) is False.
    """
    columns = []
    for k, anchor in enumerate(anchors):
        users = [u for u in range(len(samples)) if asked is None or asked[u, k]]
        everything = [sample for u in users for sample in samples[u]]
        owner = torch.tensor([n for n, u in enumerate(users) for _ in samples[u]])
        column = torch.full((len(samples),), torch.nan)
        column[users] = 0.0
        if everything:
            alone = partial(_alone, anchor)
            (scores,) = log_likelihoods(base, layers, [everything], alone, positions)
            column[users] = sum_by(scores, owner, len(users))
        columns.append(column)
    return torch.stack(columns, dim=1)


def forward_positions(base: Base) -> int:
    """Positions per batch of `log_likelihoods`."""
    return forward_limit(default_positions(base), base.device.type != "cpu")


def question_batches(
    questions: Sequence[Sequence[Encoded]], max_new_tokens: int, limit: int
) -> list[list[Piece]]:
    """All users' questions, in batches of at most `limit` positions with their answers."""
    lengths = [[len(question.prompt) + max_new_tokens for question in own] for own in questions]
    pieces = _pieces(lengths, limit)
    sizes = []
    for user, span in pieces:
        own = lengths[user][span]
        sizes.append((len(own), max(own), sum(own)))
    return [[pieces[n] for n in part] for part in micro_batches(sizes, limit)]


def sample_batches(
    samples: Sequence[Sequence[Encoded]], rows: int, limit: int
) -> list[list[Piece]]:
    """All users' samples, in batches of at most `limit` positions; rows as by `layout`."""
    lengths = [[len(item.prompt) + len(item.answer) for item in own] for own in samples]
    pieces = _pieces(lengths, limit)
    sizes = [footprint(samples[user][span], rows) for user, span in pieces]
    return [[pieces[n] for n in part] for part in micro_batches(sizes, limit)]


def _pieces(lengths: Sequence[Sequence[int]], limit: int) -> list[Piece]:
    """All samples, by their lengths per user; a user with very many is worked off in pieces."""
    pieces: list[Piece] = []
    for user, own in enumerate(lengths):
        size = max(1, limit // max(own, default=1))
        pieces += [(user, slice(n, min(n + size, len(own)))) for n in range(0, len(own), size)]
    return pieces


def _work_off(
    layers: Layers, queue: list[list[Piece]], work: Callable[[list[Piece]], None]
) -> None:
    """Do `work` batch by batch, halving what does not fit in memory; clears the layers after it."""
    try:
        while queue:
            batch = queue.pop(0)
            try:
                work(batch)
            except torch.OutOfMemoryError:
                queue[:0] = _halved(batch)
    finally:
        clear(layers)


def _sums(
    base: Base,
    layers: Layers,
    batch: Sequence[tuple[int, Sequence[Encoded]]],
    parts: Parts,
    rows: int,
) -> Sequence[Tensor]:
    """log p of each sample's answer, per piece of `batch`."""
    packed = pack([own for _, own in batch], base.tokenizer.pad_token_id, rows).to(base.device)
    frozen, trained = parts([user for user, _ in batch])
    assign(layers, frozen=frozen, trained=trained)
    counts = [len(own) for _, own in batch]
    return (-sum_by(label_losses(base, packed), packed.sample, sum(counts))).cpu().split(counts)


def _halved(batch: list[Piece]) -> list[list[Piece]]:
    """The batch in two, a lone piece by its samples. Raises InputError for a single sample."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(batch) > 1:
        return [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    user, span = batch[0]
    middle = (span.start + span.stop) // 2
    if middle == span.start:
        raise InputError(
            "out of memory: a single question does not fit on the device; lower base.max_tokens"
        )
    return [[(user, slice(span.start, middle))], [(user, slice(middle, span.stop))]]


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

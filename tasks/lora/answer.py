"""Answering for many users at once: greedy decoding, or the best of given answers."""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from tasks.lora.adapters import LoraBatch
from tasks.lora.base import Base
from tasks.lora.batches import Encoded, PerUser, collate
from tasks.lora.forward import label_losses, may_pack, row_limit, sum_by
from tasks.lora.group_train import default_positions
from tasks.lora.grouped import Layers, assigned
from tasks.lora.packing import ONE_PER_ROW, Span, pack, span_batches, work_off

# Without a backward pass, batches hold so many times the positions of training.
BATCH_FACTOR = 4
# Anchors of `evidence` whose LoRAs are on the device at once: a large bank need not fit.
MOST_ANCHORS = 16

# Users' numbers -> their frozen and their trained LoRAs; None: the bare base model.
Parts = Callable[[Sequence[int]], tuple[LoraBatch | None, LoraBatch | None]]


@torch.no_grad()
def answer_users(
    base: Base,
    layers: Layers,
    questions: PerUser,
    parts: Parts,
    max_new_tokens: int,
    positions: int | None = None,
) -> list[list[str]]:
    """Greedy answers to each user's questions; users share batches, each with their own LoRA.

    All users of a batch have the same number of rows in it, so users with equally many questions
    of like length go together.
    """
    results = [[""] * len(own) for own in questions]
    # Batches have room for the answers.
    room = [0] * max_new_tokens
    roomy = [[Encoded(question.prompt, room) for question in own] for own in questions]

    def ask(batch: list[Span]) -> None:
        asked = [roomy[user][span] for user, span in batch]
        rows = max(map(len, asked))
        # Rows to fill up with repeat the user's first question; their answers are dropped.
        filled = [one for part in asked for one in [*part, *[part[0]] * (rows - len(part))]]
        answers = greedy(base, filled, max_new_tokens)
        for place, (user, span) in enumerate(batch):
            results[user][span] = answers[place * rows :][: span.stop - span.start]

    limit = positions or BATCH_FACTOR * default_positions(base)
    _in_batches(base, layers, roomy, parts, ONE_PER_ROW, limit, ask)
    return results


@torch.no_grad()
def log_likelihoods(
    base: Base, layers: Layers, samples: PerUser, parts: Parts, positions: int | None = None
) -> list[Tensor]:
    """Per user: log p(answer | prompt) of each of the user's samples [N_u] (float32, CPU)."""
    rows = row_limit(base, samples)
    results = [torch.empty(len(own)) for own in samples]

    def measure(batch: list[Span]) -> None:
        own = [samples[user][span] for user, span in batch]
        log_p, of_sample = _label_log_p(base, own, rows)
        counts = [len(one) for one in own]
        each = sum_by(log_p, of_sample, sum(counts)).cpu().split(counts)
        for (user, span), scores in zip(batch, each, strict=True):
            results[user][span] = scores

    limit = positions or forward_positions(base)
    _in_batches(base, layers, samples, parts, rows, limit, measure)
    return results


@torch.no_grad()
def answer_log_p(
    base: Base,
    layers: Layers,
    samples: Sequence[PerUser],
    parts: Parts,
    positions: int | None = None,
) -> list[list[list[Tensor]]]:
    """Per user, question and possible answer: log p of each of its tokens [T] (float32, CPU).

    samples: per user and question, one sample per possible answer; with its end, no answer is
    likelier by being the start of another. The prompt runs once per question, as what the longest
    answer leaves of it.
    """
    shared = may_pack(base.model)
    asked = [[*map(on_one_prompt, own)] if shared else [*chain(*own)] for own in samples]
    rows = row_limit(base, asked)
    found: list[list[list[Tensor]]] = [[[]] * len(own) for own in asked]

    def measure(batch: list[Span]) -> None:
        log_p, of_answer = _label_log_p(base, [asked[user][span] for user, span in batch], rows)
        in_order = log_p[of_answer.argsort(stable=True)].cpu()
        each = iter(in_order.split(of_answer.bincount().tolist()))
        for user, span in batch:
            found[user][span] = [
                [next(each) for _ in one.choices or [()]] for one in asked[user][span]
            ]

    limit = positions or forward_positions(base)
    _in_batches(base, layers, asked, parts, rows, limit, measure)
    flat = [chain(*own) for own in found]
    return [
        [[next(one) for _ in question] for question in own]
        for own, one in zip(samples, flat, strict=True)
    ]


def greediest(answers: Sequence[Encoded], log_p: Sequence[Tensor]) -> int:
    """The number of the answer that greedy decoding ends at if it may only write one of these.

    answers, log_p: of one question, as of `answer_log_p`. Ties go to the first.
    """
    tokens = [one.answer for one in answers]
    left: list[int] = list(range(len(tokens)))
    depth = 0
    while len(left) > 1 and all(len(tokens[n]) > depth for n in left):
        best = max(left, key=lambda n: float(log_p[n][depth]))
        left = [n for n in left if tokens[n][depth] == tokens[best][depth]]
        depth += 1
    return left[0]


def on_one_prompt(samples: Sequence[Encoded]) -> Encoded:
    """A question's possible answers, one sample each, as one sample that runs the prompt once."""
    prompt = min((sample.prompt for sample in samples), key=len)
    return Encoded(prompt, [], choices=tuple(sample.answer for sample in samples))


def evidence(
    base: Base,
    layers: Layers,
    samples: PerUser,
    anchors: LoraBatch,
    positions: int | None = None,
    asked: Tensor | None = None,
) -> Tensor:
    """[U, K]: log-likelihood of each user's items under each anchor's LoRA, summed over items.

    anchors: on any device; as many at once as fit, MOST_ANCHORS at most. NaN where `asked` [U, K]
    (bool; all, if not given) is False.
    """
    tokens = sum(sample.length for own in samples for sample in own)
    limit = positions or forward_positions(base)
    several = max(1, min(MOST_ANCHORS, limit // max(tokens, 1)))
    asked = torch.ones(len(samples), anchors.count, dtype=torch.bool) if asked is None else asked
    tables = []
    for part in torch.arange(anchors.count).split(several):
        some = anchors.of(part.tolist()).to(base.device)
        tables.append(summed_evidence(base, layers, samples, asked[:, part], some, limit))
    return torch.cat(tables, 1)


def summed_evidence(
    base: Base,
    layers: Layers,
    samples: PerUser,
    asked: Tensor,
    loras: LoraBatch | None,
    positions: int,
) -> Tensor:
    """As `evidence`, of so many LoRAs at once; None: of the model as it is, once."""

    def parts(numbers: Sequence[int]) -> tuple[LoraBatch | None, None]:
        return loras.of(numbers) if loras else None, None

    users_of = [torch.nonzero(column).flatten().tolist() for column in asked.T]
    # Each anchor is a "user" whose samples are those of all users that are asked.
    everything = [[sample for u in users for sample in samples[u]] for users in users_of]
    scored = log_likelihoods(base, layers, everything, parts, positions)
    table = torch.full(asked.shape, torch.nan)
    for k, (users, scores) in enumerate(zip(users_of, scored, strict=True)):
        owner = [n for n, u in enumerate(users) for _ in samples[u]]
        table[users, k] = sum_by(scores, torch.tensor(owner, dtype=torch.long), len(users))
    return table


def forward_positions(base: Base) -> int:
    """Positions per batch of `log_likelihoods`.

    On a CPU a quarter of training's, for the nearer cache: 3,685 items of the embedded model took
    1.01 s in batches of 49,152, .76 s of 16,384 and .61 s of 4,096.
    """
    positions = default_positions(base)
    return max(512, positions // 4) if base.device.type == "cpu" else BATCH_FACTOR * positions


def _in_batches(
    base: Base,
    layers: Layers,
    samples: PerUser,
    parts: Parts,
    rows: int,
    positions: int,
    work: Callable[[list[Span]], None],
) -> None:
    """Do `work` on all users' samples, batch by batch, with the batch's LoRAs on the layers.

    rows: as the limit of `pack`.
    """
    by_user = dict(enumerate(samples))

    def adapted(batch: list[Span]) -> None:
        with assigned(layers, *parts([user for user, _ in batch]), base.adapter_dtype):
            work(batch)

    work_off(span_batches(by_user, rows, positions), by_user, adapted)


def _label_log_p(base: Base, samples: PerUser, rows: int) -> tuple[Tensor, Tensor]:
    """log p of each label [N], and the number of its sample (`Packed`)."""
    packed = pack(samples, base.tokenizer.pad_token_id, rows).to(base.device)
    return -label_losses(base, packed), packed.sample


def greedy(
    base: Base,
    questions: Sequence[Encoded],
    max_new_tokens: int,
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
) -> list[str]:
    """The greedy answer to each question, in one batch, without special tokens (`load_base`).

    processors: of token ids [N, T] and logits [N, V], what makes the logits a token is chosen by.
    """
    batch = collate(base, [Encoded(question.prompt, []) for question in questions])
    output = base.model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=max_new_tokens,
        logits_processor=LogitsProcessorList(processors),
    )
    texts = base.tokenizer.batch_decode(
        output[:, batch.input_ids.shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in texts]

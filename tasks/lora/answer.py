"""Many users' questions at once: answered greedily, or the likelihood of each possible answer."""

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

# Batches without a backward pass hold this many times the positions of training.
BATCH_FACTOR = 4
# The most anchors whose LoRAs `evidence` holds on the device: a large bank need not fit there.
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
    """Greedy answers to each user's questions. Users share batches, each with their own LoRA.

    All users of a batch have equally many rows in it. So users with equally many questions of
    similar length share a batch.
    """
    results = [[""] * len(of_user) for of_user in questions]
    # Batches are made up as if the answers were there.
    room = [0] * max_new_tokens
    roomy = [[Encoded(question.prompt, room) for question in of_user] for of_user in questions]

    def ask(batch: list[Span]) -> None:
        asked = [roomy[user][span] for user, span in batch]
        rows = max(map(len, asked))
        # A user with fewer questions repeats the first one; the extra answers are dropped.
        filled = [one for part in asked for one in [*part, *[part[0]] * (rows - len(part))]]
        answers = greedy(base, filled, max_new_tokens)
        for place, (user, span) in enumerate(batch):
            results[user][span] = answers[place * rows :][: span.stop - span.start]

    most = positions or BATCH_FACTOR * default_positions(base)
    _in_batches(base, layers, roomy, parts, ONE_PER_ROW, most, ask)
    return results


@torch.no_grad()
def log_likelihoods(
    base: Base, layers: Layers, samples: PerUser, parts: Parts, positions: int | None = None
) -> list[Tensor]:
    """Per user: log p(answer | prompt) of each of the user's samples [N_u] (float32, CPU)."""
    limit = row_limit(base, samples)
    results = [torch.empty(len(of_user)) for of_user in samples]

    def measure(batch: list[Span]) -> None:
        in_batch = [samples[user][span] for user, span in batch]
        log_p, of_sample = _label_log_p(base, in_batch, limit)
        counts = [len(of_user) for of_user in in_batch]
        each = sum_by(log_p, of_sample, sum(counts)).cpu().split(counts)
        for (user, span), scores in zip(batch, each, strict=True):
            results[user][span] = scores

    most = positions or forward_positions(base)
    _in_batches(base, layers, samples, parts, limit, most, measure)
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

    samples: per user and question, one sample per possible answer. Each has its end, so an answer
    gains nothing by being the start of another. The prompt runs once per question if samples may
    share a row (`may_pack`): as much of it as the longest answer leaves.
    """
    shared = may_pack(base.model)
    asked = [
        [*map(on_one_prompt, of_user)] if shared else [*chain(*of_user)] for of_user in samples
    ]
    limit = row_limit(base, asked)
    results: list[list[list[Tensor]]] = [[[]] * len(of_user) for of_user in asked]

    def measure(batch: list[Span]) -> None:
        log_p, of_answer = _label_log_p(base, [asked[user][span] for user, span in batch], limit)
        in_order = log_p[of_answer.argsort(stable=True)].cpu()
        each = iter(in_order.split(of_answer.bincount().tolist()))
        for user, span in batch:
            results[user][span] = [
                [next(each) for _ in one.choices or [()]] for one in asked[user][span]
            ]

    most = positions or forward_positions(base)
    _in_batches(base, layers, asked, parts, limit, most, measure)
    flat = [chain(*of_user) for of_user in results]
    return [
        [[next(answers) for _ in question] for question in of_user]
        for of_user, answers in zip(samples, flat, strict=True)
    ]


def greediest(answers: Sequence[Encoded], log_p: Sequence[Tensor]) -> int:
    """The number of the answer that greedy decoding writes if it may write only one of these.

    answers, log_p: of one question, as `answer_log_p` takes and returns them. Ties go to the first.
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

    anchors: on any device; a batch has as many as fit, MOST_ANCHORS at most. asked [U, K] (bool):
    what to compute, by default all; the rest is NaN.
    """
    tokens = sum(sample.length for of_user in samples for sample in of_user)
    most = positions or forward_positions(base)
    several = max(1, min(MOST_ANCHORS, most // max(tokens, 1)))
    asked = torch.ones(len(samples), anchors.count, dtype=torch.bool) if asked is None else asked
    tables = []
    for part in torch.arange(anchors.count).split(several):
        some = anchors.of(part.tolist()).to(base.device)
        tables.append(summed_evidence(base, layers, samples, asked[:, part], some, most))
    return torch.cat(tables, 1)


def summed_evidence(
    base: Base,
    layers: Layers,
    samples: PerUser,
    asked: Tensor,
    loras: LoraBatch | None,
    positions: int,
) -> Tensor:
    """As `evidence`, for all `loras` at once; None: for the model as it is, in one column."""

    def parts(numbers: Sequence[int]) -> tuple[LoraBatch | None, None]:
        return loras.of(numbers) if loras else None, None

    users_of = [torch.nonzero(column).flatten().tolist() for column in asked.T]
    # Each anchor stands as a "user" that has the samples of all users it is asked about.
    everything = [[sample for u in users for sample in samples[u]] for users in users_of]
    scored = log_likelihoods(base, layers, everything, parts, positions)
    table = torch.full(asked.shape, torch.nan)
    for k, (users, scores) in enumerate(zip(users_of, scored, strict=True)):
        owner = [n for n, u in enumerate(users) for _ in samples[u]]
        table[users, k] = sum_by(scores, torch.tensor(owner, dtype=torch.long), len(users))
    return table


def forward_positions(base: Base) -> int:
    """Positions per batch of `log_likelihoods`.

    On a CPU a quarter of training's, to stay in a nearer cache: 3,685 items of the embedded model
    took 1.01 s in batches of 49,152, .76 s in batches of 16,384 and .61 s of 4,096.
    """
    positions = default_positions(base)
    return max(512, positions // 4) if base.device.type == "cpu" else BATCH_FACTOR * positions


def _in_batches(
    base: Base,
    layers: Layers,
    samples: PerUser,
    parts: Parts,
    limit: int,
    positions: int,
    work: Callable[[list[Span]], None],
) -> None:
    """Do `work` on all users' samples, batch by batch, with the batch's LoRAs on the layers.

    limit: the tokens of a row (`layout`).
    """
    by_user = dict(enumerate(samples))

    def adapted(batch: list[Span]) -> None:
        with assigned(layers, *parts([user for user, _ in batch]), base.adapter_dtype):
            work(batch)

    work_off(span_batches(by_user, limit, positions), by_user, adapted)


def _label_log_p(base: Base, samples: PerUser, limit: int) -> tuple[Tensor, Tensor]:
    """log p of each label [N], and the number of its sample (`Packed`)."""
    packed = pack(samples, base.tokenizer.pad_token_id, limit).to(base.device)
    return -label_losses(base, packed), packed.sample


def greedy(
    base: Base,
    questions: Sequence[Encoded],
    max_new_tokens: int,
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
) -> list[str]:
    """The greedy answer to each question, in one batch; special tokens are left out.

    The model's generation_config is greedy (`as_base`). processors: functions of token ids [N, T]
    and logits [N, V] to the logits that the next token is chosen by.
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

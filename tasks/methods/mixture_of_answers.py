"""The anchors' answers, mixed in probability by the recipe's weights: what merging LoRAs gives up.

With the weights w_k of the user's anchors the answer y has the probability

    p(y | question) = sum_k w_k p(y | question, base + anchor k)

which, by the evidence at temperature 1, is the bank's posterior predictive (Bayesian model
averaging). The model reads a question once under each anchor, so this is no way to serve users. It
shows how far a recipe could get. Labels are compared by p(y). Text is decoded greedily: next tokens
are mixed with weights that follow what is written so far, w_k p(written | question, anchor k).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tasks.errors import InputError, label
from tasks.methods.method import Method
from tasks.model import loaded_model
from tasks.text.tokens import by_question

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.lora.adapters import LoraBatch
    from tasks.lora.base import Base
    from tasks.lora.batches import Encoded
    from tasks.lora.grouped import Layers
    from tasks.stacking import Batch


def mixed_answers(batch: Batch) -> list[list[str]]:
    """Per user an answer to each query. Raises InputError for a weight below 0."""
    import torch

    from tasks.lora.grouped import grouped

    assert batch.merger
    task, answered = batch.setting.questions.task, []
    labels = () if batch.how.answer == "generate" else task.labels
    with loaded_model(batch.setting, batch.how.quantisation) as model, torch.no_grad():
        bank, recipes, _ = batch.merger.chosen(batch.names)
        number = {name: k for k, name in enumerate(bank.ids)}
        samples = model.tokens("choices" if labels else "queries", batch.users)
        with grouped(model.base.model, list(bank.layers)) as layers:
            per_user = zip(samples, recipes, batch.names, strict=True)
            for of_user, (anchors, weights), name in per_user:
                if min(weights) < 0:
                    raise InputError(
                        f"mixture_of_answers: user {label(name)} has a weight below 0, which makes "
                        "no mixture; take fusion.weights=evidence"
                    )
                heavy = [(number[one], w) for one, w in zip(anchors, weights, strict=True) if w]
                loras = bank.of([k for k, _ in heavy]).to(model.base.device)
                log_w = torch.tensor([w for _, w in heavy], dtype=torch.float64).log()
                if labels:
                    asked = by_question(of_user, len(labels))
                    best = _labels(model.base, layers, loras, log_w, asked, batch.how.answer)
                    answered.append([labels[one] for one in best])
                else:
                    most = task.max_new_tokens
                    answered.append(_texts(model.base, layers, loras, log_w, [*of_user], most))
    return answered


def mixture(log_p: Tensor, log_w: Tensor) -> Tensor:
    """In the mixture: log p [T] of each token of an answer, given those before it.

    log_p [m, T]: under each anchor. log_w [m]: logarithms of the weights.
    """
    import torch

    so_far = torch.cat([log_w[:, None], log_w[:, None] + log_p.double().cumsum(1)], 1)
    return so_far.logsumexp(0).diff()


def _labels(
    base: Base,
    layers: Layers,
    loras: LoraBatch,
    log_w: Tensor,
    asked: Sequence[Sequence[Encoded]],
    how: str,
) -> list[int]:
    """The number of the best label for each question. asked: per question a sample per label."""
    import torch

    from tasks.lora.answer import answer_log_p, greediest

    # Each anchor stands as a "user" that is asked all the questions.
    by_anchor = answer_log_p(
        base, layers, [asked] * len(log_w), lambda some: (loras.of(some), None)
    )
    best = []
    for number, choices in enumerate(asked):
        log_p = [
            mixture(torch.stack([of_anchor[number][label] for of_anchor in by_anchor]), log_w)
            for label in range(len(choices))
        ]
        sums = [float(one.sum()) for one in log_p]
        likeliest = how == "likelihood"
        best.append(sums.index(max(sums)) if likeliest else greediest(choices, log_p))
    return best


def _texts(
    base: Base,
    layers: Layers,
    loras: LoraBatch,
    log_w: Tensor,
    asked: Sequence[Encoded],
    most: int,
) -> list[str]:
    """What the mixture answers to each question, token by token; most: tokens of an answer."""
    from tasks.lora.answer import BATCH_FACTOR, greedy
    from tasks.lora.group_train import default_positions
    from tasks.lora.grouped import assigned

    anchors = len(log_w)
    longest = max((question.length for question in asked), default=0) + most
    size = max(1, BATCH_FACTOR * default_positions(base) // (anchors * longest))
    texts: list[str] = []
    with assigned(layers, loras, None, base.adapter_dtype):
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            # Rows lie anchor by anchor. All rows of a question are written alike.
            mixing = Mixing(log_w.to(base.device), len(part))
            texts += greedy(base, [*part] * anchors, most, [mixing])[: len(part)]
    return texts


class Mixing:
    """Makes the next-token logits of m anchors for n questions those of their mixture.

    A logits processor of transformers' `generate`, for one batch whose rows lie anchor by anchor.
    """

    def __init__(self, log_w: Tensor, questions: int) -> None:
        """log_w [m]: logarithms of the anchors' weights."""
        self._log_w = log_w[:, None].repeat(1, questions)  # with what is written so far
        self._last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [m * n, T], scores [m * n, V] to log p [m * n, V]."""
        log_p = scores.double().log_softmax(-1).view(*self._log_w.shape, -1)
        if self._last is not None:
            written = input_ids[:, -1].view(*self._log_w.shape, 1)
            self._log_w = self._log_w + self._last.gather(2, written)[..., 0]
        self._last = log_p
        mixed = (self._log_w[..., None] + log_p).logsumexp(0) - self._log_w.logsumexp(0)[..., None]
        return mixed.repeat(len(self._log_w), 1).to(scores.dtype)


METHOD = Method(
    "mixture_of_answers",
    order=39,
    merged=True,
    answer=mixed_answers,
    passes=None,
    grouped=True,
    default=False,
)

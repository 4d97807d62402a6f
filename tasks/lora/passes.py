"""Which passes through the model some work takes: the engine's own batches, without a model.

Only the lengths of samples matter, so `blank` samples do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from tasks.lora.answer import question_batches
from tasks.lora.batches import Encoded
from tasks.lora.cost import Pass
from tasks.lora.packing import ONE_PER_ROW, ByUser, footprint, layout, span_batches
from tasks.lora.signature import length_batches
from tasks.lora.train import Training, batches_of


@lru_cache(maxsize=65_536)
def blank(prompt: int, answer: int) -> Encoded:
    """A sample of these lengths, of no tokens in particular."""
    return Encoded([0] * prompt, [0] * answer)


def training_passes(
    samples: Sequence[Sequence[Encoded]],
    options: Training,
    seeds: Sequence[int],
    positions: int,
    packs: bool,
) -> Iterator[list[Pass]]:
    """Per step of `train_group` its passes: every user's own batches, in the users' company."""
    plans = [batches_of(len(own), options, s) for own, s in zip(samples, seeds, strict=True)]
    for step in range(max(map(len, plans), default=0)):
        todo = {
            user: [samples[user][i] for i in plan[step]]
            for user, plan in enumerate(plans)
            if step < len(plan)
        }
        yield _passes(todo, positions, packs)


def likelihood_passes(
    samples: Sequence[Sequence[Encoded]], positions: int, packs: bool
) -> list[Pass]:
    """The passes of `log_likelihoods`."""
    return _passes(dict(enumerate(samples)), positions, packs)


def signature_passes(samples: Sequence[Encoded], positions: int) -> list[Pass]:
    """The passes of `item_signatures`: padded rows, logits at the last positions of each."""
    passes = []
    for batch in length_batches(samples, positions):
        keep = max(len(samples[i].answer) for i in batch) + 1
        width = max(samples[i].length for i in batch)
        passes.append(Pass(1, len(batch), width, len(batch) * width, len(batch) * keep))
    return passes


def answer_passes(
    questions: Sequence[Sequence[Encoded]], max_new_tokens: int, positions: int
) -> list[Pass]:
    """The prompts of the batches of `answer_users`, users filled up to the same rows."""
    passes = []
    for batch in question_batches(questions, max_new_tokens, positions):
        asked = [questions[user][span] for user, span in batch]
        rows = max(map(len, asked))
        width = max(len(one.prompt) for part in asked for one in part)
        count = len(asked) * rows
        passes.append(Pass(len(asked), rows, width, count * width, count))
    return passes


def _passes(samples: ByUser, positions: int, packs: bool) -> list[Pass]:
    """The passes of packed users, as `pack` would lay them."""
    limit = layout(samples.values()) if packs else ONE_PER_ROW
    passes = []
    for batch in span_batches(samples, limit, positions):
        users = [samples[user][span] for user, span in batch]
        sizes = [footprint(own, limit) for own in users]
        rows, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
        labels = [sum(one.labels for one in own) for own in users]
        passes.append(Pass(len(users), rows, width, len(users) * max(labels), sum(labels)))
    return passes

"""The answers of the user's nearest items, by the base model's states: personal without training.

Items and queries are vectors: the base model's last hidden states of the question, averaged over
its tokens and centred on the user's items. The answer is the commonest of the nearest items by
cosine; of equally common ones, that of the nearest item.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tasks.methods.method import Method
from tasks.model import loaded_model

if TYPE_CHECKING:
    from tasks.stacking import Batch

NEIGHBOURS = 3


def nearest(batch: Batch) -> list[list[str]]:
    """Per user an answer to each query."""
    from tasks.lora.batches import Encoded
    from tasks.lora.signature import mean_states

    near = NEIGHBOURS if batch.setting.questions.task.labels else 1
    answered = []
    with loaded_model(batch.setting) as model:
        profiles, queries = (model.tokens(kind, batch.users) for kind in ("profile", "queries"))
        for user, items, asked in zip(batch.users, profiles, queries, strict=True):
            prompts = [Encoded(one.prompt, []) for one in (*items, *asked)]
            states = mean_states(model.base, prompts)
            states = states - states[: len(items)].mean(0)
            states = states / states.norm(dim=1, keepdim=True).clamp(min=1e-12)
            cosines = states[len(items) :] @ states[: len(items)].T
            order = cosines.argsort(dim=1, descending=True, stable=True)[:, :near].tolist()
            answers = [item["answer"] for item in user["profile"]]
            ranked = [Counter(answers[n] for n in some).most_common(1) for some in order]
            answered.append([one[0][0] if one else "" for one in ranked])
    return answered


METHOD = Method("knn", order=91, answer=nearest, default=False)

"""A user's prior of labels: how often the user gave each, before a question is read.

It needs no training. By Bayes' rule the likeliest label is that of the highest

    log p(label | question, model) + strength * log prior(label | user)
    prior(label | user) = (n_label + a) / (n + a L)       n_label of the user's n items; L labels

with Laplace's smoothing `a`. The model's likelihood has a prior in it, too, so the strength is
chosen on development users.
"""

import math
from collections import Counter
from collections.abc import Sequence


def log_prior(answers: Sequence[str], labels: Sequence[str], smoothing: float) -> list[float]:
    """log prior of each label [L], by a user's answers; smoothing: above 0."""
    counts = Counter(answers)
    total = sum(counts[label] for label in labels) + smoothing * len(labels)
    return [math.log((counts[label] + smoothing) / total) for label in labels]

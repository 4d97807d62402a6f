"""What labels weigh before a question is read: how often the user gave them.

A combination that needs no training: by Bayes' rule the likeliest label is that of the highest

    log p(label | question, model) + strength * log prior(label | user)
    prior(label | user) = (n_label + a) / (n + a L)       n_label of the user's n items; L labels

with Laplace's smoothing `a`. The model's likelihood holds a prior of its own, so the strength is
chosen on development users.
"""

import math
from collections import Counter
from collections.abc import Sequence


def log_prior(given: Sequence[str], labels: Sequence[str], smoothing: float) -> list[float]:
    """log prior of each label [L], by the answers that a user gave; smoothing: above 0."""
    counts = Counter(given)
    whole = sum(counts[label] for label in labels) + smoothing * len(labels)
    return [math.log((counts[label] + smoothing) / whole) for label in labels]

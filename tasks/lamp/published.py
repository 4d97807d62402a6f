"""MTA's published scorer, where it differs from LaMP's rules (tasks/lamp/metrics.py).

Only for comparison with published numbers (`scoring.metrics=mta_published`). Source: the code of
2511.20072, `eval/` and `aggregate_results.py`:

classification  Macro-F1 over the labels that a gold or a prediction names, so that absent labels
                cost nothing and an unknown answer is a label of its own. Empty answers are left out
                of both metrics.
rating          Rounded (half to even) and clamped to 1..5; what float() cannot read, and nan and
                inf, is the farther of 1 and 5 from the gold (a gold of 3 gives 5), as in LaMP.
text            ROUGE with stemming, of the first line of the answer; of LaMP-5, of its first
                sentence only, by the first full stop.

Not followed, as it is no scoring: headlines and titles without the chat template of training, and a
repetition penalty for ratings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.lamp.definitions import LampTask


def label_columns(task: LampTask, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
    """What each (prediction, gold) adds to the sums: float64 [n, 1 + 2 C].

    Columns: counted (0 for an empty prediction); then per label: given and right, and uses in
    prediction and gold. C: the task's labels, then the unknown labels predicted, sorted.
    """
    known = {label: number for number, label in enumerate(task.labels)}
    others = sorted({given for given, _ in pairs if given} - known.keys())
    labels = known | {label: len(known) + number for number, label in enumerate(others)}
    columns = np.zeros((len(pairs), 1 + 2 * len(labels)))
    for row, (given, gold) in enumerate(pairs):
        if not given:
            continue
        columns[row, 0] = 1
        columns[row, 1 + 2 * labels[given]] = given == gold
        for used in (given, gold):
            columns[row, 2 + 2 * labels[used]] += 1
    return columns


def label_metrics(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """accuracy and macro_f1, each [...], of the columns' sums [..., 1 + 2 C]; 0 without answers."""
    counted, hits, uses = sums[..., 0], sums[..., 1::2], sums[..., 2::2]
    f1 = 2 * hits / np.where(uses > 0, uses, 1.0)
    named = np.maximum((uses > 0).sum(axis=-1), 1)
    return {
        "accuracy": hits.sum(axis=-1) / np.maximum(counted, 1.0),
        "macro_f1": f1.sum(axis=-1) / named,
    }


def on_scale(rating: float) -> int:
    """The rating that is scored."""
    return max(1, min(5, round(rating)))


def shown_text(task: LampTask, prediction: str) -> str:
    """The part of a generated text that is scored."""
    first = prediction.split("\n")[0]
    return (first.split(".")[0] if task.name == "LaMP-5" else first).strip()

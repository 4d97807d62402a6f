"""LaMP's own scoring rules (its eval/evaluation.py), without its dependencies.

Labels are stripped and looked up exactly (case counts); one outside the label set is a class of
its own, wrong and never dropped. Macro-F1 runs over the whole label set, absent labels count 0.
A rating that float() cannot read becomes the farther of 1 and 5 from its gold (a gold of 3 gives
5); nothing is rounded or clamped. float() reads "nan" and "inf" too, and so do we: one such
prediction makes mae and rmse nan or inf, and a reader sees that the model did not answer.
ROUGE-1 and ROUGE-L: F-measure, no stemming, plain mean over examples. (LaMP takes the middle of
a bootstrap of that mean, which is the same up to its random draws.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.errors import InputError
from tasks.lamp.definitions import LampTask

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

# LaMP's evaluation files call both movie tagging and news categorisation LaMP_2.
_LAMP_IDS = {
    "LaMP-1": "LaMP_1",
    "LaMP-2M": "LaMP_2",
    "LaMP-2N": "LaMP_2",
    "LaMP-3": "LaMP_3",
    "LaMP-4": "LaMP_4",
    "LaMP-5": "LaMP_5",
}


def score(
    task: LampTask, predictions: Mapping[str, str], golds: Mapping[str, str]
) -> dict[str, float]:
    """Metrics of `predictions` against `golds`, both query id -> text.

    Returns accuracy and macro_f1 (classification), mae and rmse (rating), or rouge1 and rougeL
    (text); all but mae and rmse lie in 0..1.
    Raises InputError when there is nothing to score, the sets of ids differ, or a gold is not one
    of the task's labels (LaMP would count such a gold as hit by any other unknown label).
    """
    _check_ids(task, predictions, golds)
    ids = list(golds)
    predicted = [predictions[query_id].strip() for query_id in ids]
    gold = [golds[query_id].strip() for query_id in ids]
    if task.labels:
        for query_id, label in zip(ids, gold, strict=True):
            if label not in task.labels:
                raise InputError(
                    f"{task.name}: the gold {label!r} of query {query_id!r} is not one of its "
                    f"labels; use {', '.join(task.labels)}"
                )
    if task.kind == "classification":
        hits = [a == b for a, b in zip(predicted, gold, strict=True)]
        return {"accuracy": float(np.mean(hits)), "macro_f1": _macro_f1(task, predicted, gold)}
    if task.kind == "rating":
        errors = np.array([_rating_error(a, b) for a, b in zip(predicted, gold, strict=True)])
        return {"mae": float(errors.mean()), "rmse": math.sqrt(float((errors**2).mean()))}
    rouge = np.array([_rouge(a, b) for a, b in zip(predicted, gold, strict=True)]).mean(axis=0)
    return {"rouge1": float(rouge[0]), "rougeL": float(rouge[1])}


def example_score(task: LampTask, prediction: str, gold: str) -> float:
    """What one example contributes; higher is better, so that methods can be compared by pairs.

    classification: 1 if right, else 0 (mean = accuracy). rating: minus the absolute error
    (mean = -mae). text: ROUGE-L F-measure (mean = rougeL).
    """
    prediction, gold = prediction.strip(), gold.strip()
    if task.kind == "classification":
        return float(prediction == gold)
    if task.kind == "rating":
        return -_rating_error(prediction, gold)
    return _rouge(prediction, gold)[1]


def golds_json(task: LampTask, predictions: Mapping[str, str]) -> dict[str, Any]:
    """Predictions in LaMP's own file format, ids in the order given.

    {"task": "LaMP_2", "golds": [{"id", "output"}]}; the key is `golds` for predictions too.
    """
    return {
        "task": _LAMP_IDS[task.name],
        "golds": [{"id": query_id, "output": text} for query_id, text in predictions.items()],
    }


def _check_ids(task: LampTask, predictions: Collection[str], golds: Collection[str]) -> None:
    if not golds:
        raise InputError(f"{task.name}: there are no golds to score against; give some queries")
    for name, ids, others in (
        ("queries have no prediction", golds, predictions),
        ("predictions have no gold", predictions, golds),
    ):
        alone = [query_id for query_id in ids if query_id not in others]
        if alone:
            some = ", ".join(repr(query_id) for query_id in alone[:5])
            raise InputError(
                f"{task.name}: {len(alone)} {name} (ids {some}{' ...' if alone[5:] else ''}); "
                "predictions and golds must have the same ids"
            )


def _macro_f1(task: LampTask, predicted: list[str], gold: list[str]) -> float:
    """Mean over the label set of 2 tp / (predicted + gold); 0 for a label that nobody uses."""
    hits = Counter(a for a, b in zip(predicted, gold, strict=True) if a == b)
    uses = Counter(predicted) + Counter(gold)
    f1 = [2 * hits[label] / uses[label] if uses[label] else 0.0 for label in task.labels]
    return float(np.mean(f1))


def _rating_error(prediction: str, gold: str) -> float:
    """Absolute error; float() takes what Python takes, "4.0" and "nan" included."""
    wanted = float(gold)
    try:
        rating = float(prediction)
    except ValueError:
        rating = 1.0 if abs(1 - wanted) > abs(5 - wanted) else 5.0
    return abs(rating - wanted)


@cache
def _scorer() -> RougeScorer:
    # Imported here: it brings nltk, which only the text tasks need.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


def _rouge(prediction: str, gold: str) -> tuple[float, float]:
    scores = _scorer().score(gold, prediction)
    return scores["rouge1"].fmeasure, scores["rougeL"].fmeasure

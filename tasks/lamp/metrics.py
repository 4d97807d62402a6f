"""LaMP's own scoring rules (its eval/evaluation.py), without its dependencies.

Labels are stripped and compared exactly (case counts); one outside the label set is wrong, never
dropped. Macro-F1 is over the whole label set; absent labels count 0.
A rating that float() cannot read becomes the farther of 1 and 5 from its gold (a gold of 3 gives
5); nothing is rounded or clamped. float() reads "nan" and "inf", and one such prediction makes mae
and rmse nan or inf.
ROUGE-1 and ROUGE-L: F-measure, no stemming, mean over examples. (LaMP takes the middle of a
bootstrap of that mean, which is the same up to its random draws.) Words are runs of a to z and
digits, so a text in another script has none and scores 0. By the rules `unicode` words are those of
tasks/lamp/words.py, case folded, of text in Unicode's form NFKC.

Every metric is a function of sums over examples. It is computed in two steps: what each example
adds (`example_columns`), and the metrics of the sums (`from_sums`), which tasks/lamp/statistics.py
applies to resampled sums as well.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tasks.errors import InputError
from tasks.lamp import published
from tasks.lamp.definitions import LampTask
from tasks.lamp.words import words

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

Rules = Literal["lamp", "mta_published", "unicode"]


def rules_of(
    task: LampTask, metrics: Literal["lamp", "mta_published"], tokens: Literal["lamp", "unicode"]
) -> Rules:
    """The rules of `scoring.metrics` and `scoring.tokens` for a task; tokens concern text only."""
    return "unicode" if tokens == "unicode" and task.kind == "text" else metrics


def score(
    task: LampTask,
    predictions: Mapping[str, str],
    golds: Mapping[str, str],
    rules: Rules = "lamp",
) -> dict[str, float]:
    """Metrics of `predictions` against `golds`, both query id -> text, in any order.

    rules: LaMP's, those of MTA's published scorer (tasks/lamp/published.py), or LaMP's with words
    of any script.
    Returns accuracy and macro_f1 (classification), mae and rmse (rating), or rouge1 and rougeL
    (text); all but mae and rmse lie in 0..1.
    Raises InputError as `example_columns` does.
    """
    columns = example_columns(task, predictions, golds, rules)
    values = from_sums(task, columns.sum(axis=0), len(columns), rules)
    return {name: float(value) for name, value in values.items()}


def example_columns(
    task: LampTask,
    predictions: Mapping[str, str],
    golds: Mapping[str, str],
    rules: Rules = "lamp",
) -> np.ndarray:
    """What each example adds to the sums of the metrics: float64 [n, k], rows by sorted query id.

    Columns, with L labels:
    classification (k = 2 L): label l was given and right; uses of l in prediction and gold; by the
        published rules `published.label_columns`.
    rating (k = 2): absolute error, and its square. text (k = 2): ROUGE-1 and ROUGE-L F-measure.
    Raises InputError when there is nothing to score, the sets of ids differ, or a gold is not one
    of the task's labels (LaMP would count such a gold as hit by any other unknown label).
    """
    _check_ids(task, predictions, golds)
    ids = sorted(golds)
    pairs = [(predictions[query_id].strip(), golds[query_id].strip()) for query_id in ids]
    if task.labels:
        for query_id, (_, gold) in zip(ids, pairs, strict=True):
            if gold not in task.labels:
                raise InputError(
                    f"{task.name}: the gold of query {query_id!r} is not one of its "
                    f"labels; use {', '.join(task.labels)}"
                )
    as_lamp = rules != "mta_published"
    if task.kind == "classification":
        return _label_uses(task, pairs) if as_lamp else published.label_columns(task, pairs)
    if task.kind == "rating":
        error = _rating_error if as_lamp else published.rating_error
        errors = np.array([error(prediction, gold) for prediction, gold in pairs])
        # A prediction such as 1e200 is a rating to float(), its square is inf.
        with np.errstate(over="ignore"):
            return np.stack([errors, errors**2], axis=1)
    if not as_lamp:
        pairs = [(published.shown_text(task, prediction), gold) for prediction, gold in pairs]
    return np.array([_rouge(prediction, gold, rules) for prediction, gold in pairs])


def from_sums(
    task: LampTask, sums: np.ndarray, count: np.ndarray | int, rules: Rules = "lamp"
) -> dict[str, np.ndarray]:
    """The metrics, each [...], of the sums [..., k] of `example_columns` over `count` > 0."""
    if task.kind == "classification" and rules == "mta_published":
        return published.label_metrics(sums)
    if task.kind == "classification":
        hits, uses = np.split(sums, 2, axis=-1)
        # 2 tp / (predicted + gold) per label, 0 for a label that nobody uses.
        f1 = 2 * hits / np.where(uses > 0, uses, 1.0)
        return {"accuracy": hits.sum(axis=-1) / count, "macro_f1": f1.mean(axis=-1)}
    first, second = sums[..., 0] / count, sums[..., 1] / count
    if task.kind == "rating":
        return {"mae": first, "rmse": np.sqrt(second)}
    return {"rouge1": first, "rougeL": second}


def golds_without_token(task: LampTask, golds: Iterable[str], rules: Rules = "lamp") -> int:
    """Count golds without a word for ROUGE, so that every answer scores 0."""
    if task.kind != "text":
        return 0
    # Not through `_tokenizer`: stemming leaves no word empty, and its nltk takes seconds to import.
    from rouge_score.tokenize import tokenize

    if rules == "unicode":
        return sum(not _AnyScript().tokenize(gold) for gold in golds)
    return sum(not tokenize(gold, None) for gold in golds)


def remarks(rules: Rules, tokenless: int) -> list[str]:
    """Lines for a reader of the scores: the rules, and golds without a word."""
    lines = []
    if rules == "mta_published":
        lines.append("metrics by the rules of MTA's published scorer, not by LaMP's")
    if rules == "unicode":
        lines.append("ROUGE of words of any script (scoring.tokens), not by LaMP's rule")
    if tokenless:
        letter, advice = " a to z", " (scoring.tokens unicode has words of any script)"
        if rules == "unicode":
            letter = advice = ""
        lines.append(
            f"{tokenless} golds have no letter{letter} and no digit, so every answer to them has "
            f"ROUGE 0{advice}"
        )
    return lines


def unlabelled(task: LampTask, predictions: Mapping[str, str], rules: Rules = "lamp") -> list[str]:
    """Sorted ids of the queries whose answer is no label or rating; none for text tasks.

    By the published rules nan and inf are no ratings either. predictions: query id -> text.
    """
    return [
        query_id
        for query_id in sorted(predictions)
        if task.labels and not _is_label(task, predictions[query_id].strip(), rules)
    ]


def golds_json(task: LampTask, predictions: Mapping[str, str]) -> dict[str, Any]:
    """Predictions in LaMP's own file format, ids in the order given.

    {"task": "LaMP_2", "golds": [{"id", "output"}]}; the key is `golds` for predictions too.
    LaMP calls both 2M and 2N LaMP_2; its present evaluation.py cannot score 2N (docs/data.md).
    """
    return {
        "task": f"LaMP_{task.name.removeprefix('LaMP-').rstrip('MN')}",
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


def _label_uses(task: LampTask, pairs: list[tuple[str, str]]) -> np.ndarray:
    labels = {label: number for number, label in enumerate(task.labels)}
    columns = np.zeros((len(pairs), 2 * len(labels)))
    for row, (prediction, gold) in enumerate(pairs):
        if prediction == gold:
            columns[row, labels[gold]] = 1
        for used in (prediction, gold):
            if used in labels:
                columns[row, len(labels) + labels[used]] += 1
    return columns


def _is_label(task: LampTask, prediction: str, rules: Rules) -> bool:
    if task.kind == "classification":
        return prediction in task.labels
    try:
        rating = float(prediction)
    except ValueError:
        return False
    return rules == "lamp" or math.isfinite(rating)


def _rating_error(prediction: str, gold: str) -> float:
    """Absolute error; float() reads "4.0" and "nan", too."""
    wanted = float(gold)
    try:
        rating = float(prediction)
    except ValueError:
        rating = 1.0 if abs(1 - wanted) > abs(5 - wanted) else 5.0
    return abs(rating - wanted)


class _AnyScript:
    """rouge-score's tokenizer for texts that are not English alone."""

    def tokenize(self, text: str) -> list[str]:
        return words(unicodedata.normalize("NFKC", text).casefold())


@cache
def _tokenizer(rules: Rules) -> Any:
    if rules == "unicode":
        return _AnyScript()
    # Imported here: it brings nltk, which only the text tasks need.
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=rules == "mta_published")


@cache
def _scorer(rules: Rules) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], tokenizer=_tokenizer(rules))


def _rouge(prediction: str, gold: str, rules: Rules) -> tuple[float, float]:
    scores = _scorer(rules).score(gold, prediction)
    return scores["rouge1"].fmeasure, scores["rougeL"].fmeasure

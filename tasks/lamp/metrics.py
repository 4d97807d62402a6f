"""LaMP's own scoring rules (its eval/evaluation.py), and those of MTA's published scorer.

Labels are stripped and compared exactly (case counts); one outside the label set is wrong, never
dropped. Macro-F1 is over the whole label set; absent labels count 0.
A rating that float() cannot read becomes the farther of 1 and 5 from its gold (a gold of 3 gives
5). float() reads "nan" and "inf", and one such prediction makes mae and rmse nan or inf.
ROUGE-1 and ROUGE-L: F-measure, no stemming, mean over examples (of which LaMP takes the middle of
a bootstrap). Words are runs of a to z and digits; by the rules `unicode` those of
tasks/lamp/words.py, case folded, in Unicode's form NFKC.

MTA's scorer (`mta_published`; source: the code of 2511.20072, `eval/` and `aggregate_results.py`)
differs. Macro-F1 is over the labels that a gold or a prediction names, an unknown answer is a label
of its own, and empty answers are left out. Ratings are rounded (half to even) and clamped to 1..5;
nan and inf are as what float() cannot read. ROUGE stems, and sees the first line of the answer; of
LaMP-5 its first sentence, by the first full stop. (Not followed, as it is no scoring: headlines and
titles without the chat template of training, and a repetition penalty for ratings.)

Every metric is a function of sums over examples: what each adds (`example_columns`), then the
metrics of the sums (`from_sums`), which tasks/lamp/statistics.py applies to resampled sums as well.
"""

import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.lamp.definitions import LampTask
from tasks.lamp.words import words

Rules = Literal["lamp", "mta_published", "unicode"]
Floats = NDArray[np.float64]
Texts = Mapping[str, str]  # query id -> text


def rules_of(
    task: LampTask, metrics: Literal["lamp", "mta_published"], tokens: Literal["lamp", "unicode"]
) -> Rules:
    """The rules of `scoring.metrics` and `scoring.tokens` for a task; tokens concern text only."""
    return "unicode" if tokens == "unicode" and task.kind == "text" else metrics


def example_columns(
    task: LampTask, predictions: Texts, golds: Texts, rules: Rules = "lamp"
) -> Floats:
    """What each example adds to the sums of the metrics: float64 [n, k], rows by sorted query id.

    classification (k = 1 + 2 C): whether it counts (by the published rules an empty prediction does
        not); then per label: right answers, and uses in prediction and gold. C: the task's
        labels; by the published rules also the unknown ones that are predicted, sorted.
    rating (k = 2): absolute error, and its square. text (k = 2): ROUGE-1 and ROUGE-L F-measure.
    Golds are among the task's labels; what is read has no others (tasks/lamp/kept.py).
    """
    if predictions.keys() != golds.keys():
        raise ValueError(f"{task.name}: predictions and golds must have the same ids")
    pairs = [(predictions[one].strip(), golds[one].strip()) for one in sorted(golds)]
    as_lamp = rules != "mta_published"
    if task.kind == "classification":
        return _label_columns(task, pairs, as_lamp)
    if task.kind == "rating":
        errors = np.array([_rating_error(prediction, gold, as_lamp) for prediction, gold in pairs])
        # A prediction such as 1e200 is a rating to float(), its square is inf.
        with np.errstate(over="ignore"):
            return np.stack([errors, errors**2], axis=1)
    if not as_lamp:
        end = "." if task.name == "LaMP-5" else "\n"
        pairs = [(said.split("\n")[0].split(end)[0].strip(), gold) for said, gold in pairs]
    scores = [_rouge(rules)(gold, said) for said, gold in pairs]
    return np.array([(one["rouge1"].fmeasure, one["rougeL"].fmeasure) for one in scores])


def from_sums(
    task: LampTask, sums: Floats, count: Floats | int, rules: Rules = "lamp"
) -> dict[str, Floats]:
    """The metrics, each [...], of the sums [..., k] of `example_columns` over `count` > 0."""
    if task.kind == "classification":
        counted, hits, uses = sums[..., 0], sums[..., 1::2], sums[..., 2::2]
        # 2 tp / (predicted + gold) per label, 0 for a label that nobody uses.
        f1 = 2 * hits / np.where(uses > 0, uses, 1.0)
        labels: Floats | int = len(task.labels)
        if rules == "mta_published":
            labels = np.maximum((uses > 0).sum(axis=-1), 1)
        accuracy = hits.sum(axis=-1) / np.maximum(counted, 1.0)
        return {"accuracy": accuracy, "macro_f1": f1.sum(axis=-1) / labels}
    first, second = sums[..., 0] / count, sums[..., 1] / count
    if task.kind == "rating":
        return {"mae": first, "rmse": np.sqrt(second)}
    return {"rouge1": first, "rougeL": second}


def golds_without_token(task: LampTask, golds: Iterable[str], rules: Rules = "lamp") -> int:
    """Count golds without a word for ROUGE, so that every answer scores 0."""
    if task.kind != "text":
        return 0
    if rules == "unicode":
        return sum(not _AnyScript().tokenize(gold) for gold in golds)
    # Stemming leaves no word empty, and its nltk takes seconds to import.
    from rouge_score.tokenize import tokenize

    return sum(not tokenize(gold, None) for gold in golds)


def remarks(rules: Rules, tokenless: int) -> list[str]:
    """Lines for a reader of the scores: the rules, and golds without a word."""
    letter, advice = " a to z", " (scoring.tokens unicode has words of any script)"
    lines = []
    if rules == "mta_published":
        lines = ["metrics by the rules of MTA's published scorer, not by LaMP's"]
    if rules == "unicode":
        letter = advice = ""
        lines = ["ROUGE of words of any script (scoring.tokens), not by LaMP's rule"]
    if tokenless:
        lines.append(
            f"{tokenless} golds have no letter{letter} and no digit, so every answer to them has "
            f"ROUGE 0{advice}"
        )
    return lines


def unlabelled(task: LampTask, predictions: Texts, rules: Rules = "lamp") -> list[str]:
    """Sorted ids of the queries whose answer is no label or rating; none for text tasks.

    By the published rules nan and inf are no ratings either.
    """
    return [
        query_id
        for query_id, said in sorted(predictions.items())
        if task.labels and not _is_label(task, said.strip(), rules)
    ]


def golds_json(task: LampTask, predictions: Texts) -> dict[str, object]:
    """Predictions in LaMP's own file format, ids in the order given; the key is `golds` there too.

    LaMP calls both 2M and 2N LaMP_2; its present evaluation.py cannot score 2N (docs/data.md).
    """
    return {
        "task": f"LaMP_{task.name.removeprefix('LaMP-').rstrip('MN')}",
        "golds": [{"id": query_id, "output": text} for query_id, text in predictions.items()],
    }


def _label_columns(task: LampTask, pairs: list[tuple[str, str]], as_lamp: bool) -> Floats:
    labels = list(task.labels)
    if not as_lamp:
        labels += sorted({answer for answer, _ in pairs if answer} - {*labels})
    numbers = {label: number for number, label in enumerate(labels)}
    columns = np.zeros((len(pairs), 1 + 2 * len(labels)))
    for row, (answer, gold) in enumerate(pairs):
        if not answer and not as_lamp:
            continue
        columns[row, 0] = 1
        columns[row, 1 + 2 * numbers[gold]] = answer == gold
        for used in (answer, gold):
            if used in numbers:
                columns[row, 2 + 2 * numbers[used]] += 1
    return columns


def _is_label(task: LampTask, prediction: str, rules: Rules) -> bool:
    if task.kind == "classification":
        return prediction in task.labels
    return _rating(prediction, rules == "lamp") is not None


def _rating(prediction: str, as_lamp: bool) -> float | None:
    """What float() reads, "4.0" too, and for LaMP "nan"; else None."""
    try:
        rating = float(prediction)
    except ValueError:
        return None
    return rating if as_lamp or math.isfinite(rating) else None


def _rating_error(prediction: str, gold: str, as_lamp: bool) -> float:
    """Absolute error; of what is no rating, as if it were the farther of 1 and 5."""
    wanted, rating = float(gold), _rating(prediction, as_lamp)
    if rating is None:
        return max(wanted - 1, 5 - wanted)
    return abs((rating if as_lamp else max(1, min(5, round(rating)))) - wanted)


class _AnyScript:
    """rouge-score's tokenizer for texts that are not English alone."""

    def tokenize(self, text: str) -> list[str]:
        return words(unicodedata.normalize("NFKC", text).casefold())


@cache
def _rouge(rules: Rules) -> Callable[[str, str], Any]:
    """What scores a gold and a prediction."""
    from rouge_score.rouge_scorer import RougeScorer  # it brings nltk, for text tasks alone

    tokenizer = _AnyScript() if rules == "unicode" else None
    stems = rules == "mta_published"
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=stems, tokenizer=tokenizer)
    score: Callable[[str, str], Any] = scorer.score
    return score

"""MTA's published scorer, by hand; read from its `eval/*.py` and `aggregate_results.py`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.lamp.definitions import LampTask, get_task
from tasks.lamp.statistics import ScoredAnswers, bootstrap, intervals
from tests.unit.lamp.scoring import score

MOVIES, RATINGS, HEADLINES, TITLES = (
    get_task(name) for name in ("LaMP-2M", "LaMP-3", "LaMP-4", "LaMP-5")
)


def scores(task: LampTask, predicted: list[str], golds: list[str]) -> dict[str, float]:
    """The metrics, after a look that the bootstrap's points are the same numbers."""
    given = {str(n): text for n, text in enumerate(predicted)}
    wanted = {str(n): text for n, text in enumerate(golds)}
    result = score(task, given, wanted, "mta_published")
    groups = {query_id: str(int(query_id) % 2) for query_id in wanted}
    # Beside a method that names more unknown labels, which must not change this one's numbers.
    predictions = {"m": given, "other": dict.fromkeys(given, "x") | {"0": "y"}}
    scored = ScoredAnswers.of(task, wanted, groups, predictions, "s", "mta_published")
    points = intervals(bootstrap(scored, seed=0, resamples=4))["m"]
    assert {metric: points[metric]["point"] for metric in result} == result
    return result


def test_labels_by_hand() -> None:
    # Named: comedy (tp 1, predicted 2, gold 1: 2/3), action (tp 1, predicted 1, gold 2: 2/3),
    # classic (gold 1: 0), "drama", which is no label (predicted 1: 0). Empty answers do not count.
    predicted = ["comedy", "comedy ", "action", "drama", "  "]
    golds = ["comedy", "action", "action", "classic", "fantasy"]
    assert scores(MOVIES, predicted, golds) == {
        "accuracy": pytest.approx(2 / 4),
        "macro_f1": pytest.approx((2 / 3 + 2 / 3) / 4),
    }
    lamp = score(MOVIES, *({str(n): t for n, t in enumerate(x)} for x in (predicted, golds)))
    assert lamp == {
        "accuracy": pytest.approx(2 / 5),
        "macro_f1": pytest.approx((2 / 3 + 2 / 3) / 15),
    }


def test_nothing_answered() -> None:
    assert scores(MOVIES, ["", " "], ["comedy", "action"]) == {"accuracy": 0.0, "macro_f1": 0.0}


labels = st.sampled_from([*MOVIES.labels[:4], "unknown", "other"])


@given(st.lists(st.tuples(labels, st.sampled_from(MOVIES.labels[:5])), min_size=1, max_size=12))
def test_macro_f1_without_a_label_set_is_scikit_learns(pairs: list[tuple[str, str]]) -> None:
    """`f1_score(golds, predictions, average="macro", zero_division=0)`, as it is called there."""
    metrics = pytest.importorskip("sklearn.metrics")
    predicted, golds = map(list, zip(*pairs, strict=True))
    result = scores(MOVIES, predicted, golds)
    expected = metrics.f1_score(golds, predicted, average="macro", zero_division=0)
    assert result["macro_f1"] == pytest.approx(expected)
    assert result["accuracy"] == pytest.approx(metrics.accuracy_score(golds, predicted))


@pytest.mark.parametrize(
    ("prediction", "gold", "error"),
    [
        ("4", "4", 0),
        ("4.4", "4", 0),  # rounded
        ("4.5", "5", 1),  # half to even: 4
        ("3.5", "5", 1),  # half to even: 4
        ("9", "5", 0),  # clamped
        ("-3", "2", 1),
        ("0.2", "1", 0),
        ("five", "1", 4),  # the farther end, as in LaMP
        ("", "5", 4),
        ("4 stars", "3", 2),
        ("nan", "2", 3),  # round(nan) raises, and counts as unreadable
        ("inf", "5", 4),
        ("1e200", "3", 2),
    ],
)
def test_ratings_by_hand(prediction: str, gold: str, error: float) -> None:
    result = scores(RATINGS, [prediction, "3"], [gold, "3"])
    assert result == {
        "mae": pytest.approx(error / 2),
        "rmse": pytest.approx(np.sqrt(error**2 / 2)),
    }


def test_rouge_stems() -> None:
    # "running cats" and "run cat" share no word, and both stems (Porter): 0 and 1.
    ids = {"0": "running cats"}, {"0": "run cat"}
    assert score(HEADLINES, *ids) == {"rouge1": 0.0, "rougeL": 0.0}
    assert scores(HEADLINES, ["running cats"], ["run cat"]) == {"rouge1": 1.0, "rougeL": 1.0}


def test_the_part_of_a_text_that_counts() -> None:
    # One gold word. Headlines: the first line; titles: up to the first full stop of it.
    answer = "ship. sea\nland land"
    # Headline: "ship", "sea": precision 1/2, recall 1, F 2/3. Title: "ship" alone.
    assert scores(HEADLINES, [answer], ["ship"])["rouge1"] == pytest.approx(2 / 3)
    assert scores(TITLES, [answer], ["ship"])["rouge1"] == 1.0
    # LaMP's rules take all four words: precision 1/4, F 2/5.
    assert score(TITLES, {"0": answer}, {"0": "ship"})["rouge1"] == pytest.approx(2 / 5)

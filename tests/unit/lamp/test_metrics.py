"""LaMP's scoring rules, by hand and against scikit-learn."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import InputError
from tasks.lamp.definitions import get_task
from tasks.lamp.metrics import example_score, golds_json, score

MOVIES, RATINGS, TITLES = (get_task(name) for name in ("LaMP-2M", "LaMP-3", "LaMP-5"))


def by_number(values: list[str]) -> dict[str, str]:
    return {str(n): value for n, value in enumerate(values)}


def test_classification_by_hand() -> None:
    # comedy: tp 1, predicted 2, gold 2 -> 1/2; action: tp 1, predicted 1, gold 2 -> 2/3; the
    # label nobody knows and the one in another case are wrong; 13 of 15 labels count 0.
    predicted = by_number([" comedy\n", "comedy", "action", "Comedy", "no such tag"])
    golds = by_number(["comedy", "action", "action ", "comedy", "classic"])
    assert score(MOVIES, predicted, golds) == {
        "accuracy": pytest.approx(2 / 5),
        "macro_f1": pytest.approx((1 / 2 + 2 / 3) / 15),
    }


labels = st.sampled_from([*MOVIES.labels[:4], "unknown"])


@settings(deadline=None)
@given(st.lists(st.tuples(labels, labels.filter(lambda x: x != "unknown")), min_size=1))
def test_macro_f1_equals_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    classes = [
        [MOVIES.labels.index(x) if x in MOVIES.labels else -1 for x in side]
        for side in zip(*pairs, strict=True)
    ]
    expected = metrics.f1_score(
        classes[1], classes[0], labels=list(range(15)), average="macro", zero_division=0
    )
    predicted, golds = (by_number(list(side)) for side in zip(*pairs, strict=True))
    result = score(MOVIES, predicted, golds)
    assert result["macro_f1"] == pytest.approx(expected)
    examples = [example_score(MOVIES, p, g) for p, g in pairs]
    assert result["accuracy"] == pytest.approx(sum(examples) / len(examples))


@pytest.mark.parametrize(
    ("prediction", "gold", "error"),
    [
        ("4", "4", 0),
        (" 4.0 ", "5", 1),
        ("4.4", "4", 0.4),  # nothing is rounded
        ("9", "5", 4),  # nothing is clamped
        ("four", "1", 4),
        ("", "2", 3),
        ("?", "3", 2),  # a gold of 3 gives 5
        ("?", "4", 3),
        ("?", "5", 4),
    ],
)
def test_rating_by_hand(prediction: str, gold: str, error: float) -> None:
    assert example_score(RATINGS, prediction, gold) == pytest.approx(-error)
    result = score(RATINGS, {"a": prediction, "b": "1"}, {"a": gold, "b": "1"})
    assert result["mae"] == pytest.approx(error / 2)
    assert result["rmse"] == pytest.approx(math.sqrt(error**2 / 2))


def test_nan_is_a_number_to_lamp() -> None:
    result = score(RATINGS, {"a": "nan", "b": "1"}, {"a": "3", "b": "1"})
    assert math.isnan(result["mae"])
    assert math.isnan(result["rmse"])


def test_rouge_by_hand() -> None:
    # Unigrams: 2 of 3 predicted, 2 of 4 gold -> F 4/7; longest common subsequence 1 -> 2/7.
    # "models" is not "model": no stemming.
    predicted = by_number(["model language big", "models"])
    golds = by_number(["A big language system", "model"])
    result = score(TITLES, predicted, golds)
    assert result == {
        "rouge1": pytest.approx((4 / 7 + 0) / 2),
        "rougeL": pytest.approx((2 / 7 + 0) / 2),
    }
    examples = [example_score(TITLES, predicted[n], golds[n]) for n in golds]
    assert result["rougeL"] == pytest.approx(sum(examples) / 2)
    assert score(TITLES, {"a": ""}, {"a": "x"}) == {"rouge1": 0.0, "rougeL": 0.0}


@pytest.mark.parametrize(
    ("predicted", "golds", "message"),
    [
        ({"a": "x"}, {"a": "comedy", "b": "comedy"}, "1 queries have no prediction.*'b'"),
        ({"a": "x", "c": "x"}, {"a": "comedy"}, "1 predictions have no gold.*'c'"),
        ({}, {}, "no golds"),
        ({"a": "x"}, {"a": "none"}, "gold 'none' of query 'a'"),
        ({}, by_number(["comedy"] * 9), r"9 queries.*'4' \.\.\."),
    ],
)
def test_error_lines(predicted: dict[str, str], golds: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        score(MOVIES, predicted, golds)
    assert "\n" not in str(caught.value)


def test_golds_json() -> None:
    assert golds_json(get_task("LaMP-2N"), {"b": "x", "a": "y"}) == {
        "task": "LaMP_2",
        "golds": [{"id": "b", "output": "x"}, {"id": "a", "output": "y"}],
    }
    assert golds_json(TITLES, {})["task"] == "LaMP_5"

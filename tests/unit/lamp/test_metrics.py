"""LaMP's scoring rules, by hand and against scikit-learn; bootstrapped points obey them too."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.lamp.definitions import TASKS, LampTask, get_task
from tasks.lamp.formats import read_users
from tasks.lamp.metrics import (
    Rules,
    example_columns,
    from_sums,
    golds_json,
    golds_without_token,
    unlabelled,
)
from tasks.lamp.statistics import ScoredAnswers, bootstrap, intervals
from tests.official import write_official
from tests.unit.lamp.scoring import score

MOVIES, RATINGS, TITLES = (get_task(name) for name in ("LaMP-2M", "LaMP-3", "LaMP-5"))


def by_number(values: list[str]) -> dict[str, str]:
    return {str(n): value for n, value in enumerate(values)}


def scores(task: LampTask, predicted: list[str], golds: list[str]) -> dict[str, float]:
    """The metrics, after a look that the bootstrap's points are the same numbers, bit by bit."""
    given, wanted = by_number(predicted), by_number(golds)
    groups = {query_id: str(int(query_id) % 2) for query_id in wanted}
    scored = ScoredAnswers.of(task, wanted, groups, {"m": given}, sample="s")
    points = intervals(bootstrap(scored, seed=0, resamples=4))["m"]
    result = score(task, given, wanted)
    for metric, value in result.items():
        point = points[metric]["point"]
        # JSON has no nan and no inf: the statistics say None.
        assert point == value if math.isfinite(value) else point is None
    return result


def test_classification_by_hand() -> None:
    # comedy: tp 1, predicted 2, gold 2 -> 1/2; action: tp 1, predicted 1, gold 2 -> 2/3; the
    # label nobody knows and the one in another case are wrong; 13 of 15 labels count 0.
    predicted = [" comedy\n", "comedy", "action", "Comedy", "no such tag"]
    golds = ["comedy", "action", "action ", "comedy", "classic"]
    assert scores(MOVIES, predicted, golds) == {
        "accuracy": pytest.approx(2 / 5),
        "macro_f1": pytest.approx((1 / 2 + 2 / 3) / 15),
    }


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("dark comedy", True),
        ("\t dark comedy \r\n", True),  # stripped
        ("\u00a0dark comedy\u3000", True),  # of everything that str.strip takes for space
        ("dark  comedy", False),  # spaces within count
        ("dark\ncomedy", False),
        ("Dark comedy", False),  # so does the case
        ("DARK COMEDY", False),
        ("dark comedy.", False),
        ("tag: dark comedy", False),
        ("dark comedy, comedy", False),
        ("comedy", False),  # part of the label, and a label of its own
        ("dark", False),
        ("-1", False),  # LaMP's number for unknown labels is not a name for them
        ("6", False),  # nor is a label's place in the list one
        ("nan", False),
        ("None", False),
        ("", False),
        ("   ", False),
    ],
)
def test_labels_are_stripped_and_looked_up_exactly(prediction: str, right: bool) -> None:
    # One more query, of another label, is right: accuracy 1 or 1/2. Macro-F1 over 15 labels: the
    # other label has 1; "dark comedy" has 1 if right, and 0 without a hit, given or not.
    assert scores(MOVIES, [prediction, "action"], ["dark comedy", "action"]) == {
        "accuracy": (1 + right) / 2,
        "macro_f1": pytest.approx((1 + right) / 15),
    }


def test_a_wrong_label_costs_the_label_that_was_named() -> None:
    # action: tp 1, predicted 2 -> F1 2 / (2 + 1); had the first been unknown, 2 / (1 + 1).
    for prediction, action in (("action", 2 / 3), ("unknown", 1.0)):
        assert scores(MOVIES, [prediction, "action"], ["comedy", "action"]) == {
            "accuracy": 0.5,
            "macro_f1": pytest.approx(action / 15),
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
    result = scores(MOVIES, *map(list, zip(*pairs, strict=True)))
    assert result["macro_f1"] == pytest.approx(expected)
    assert result["accuracy"] == pytest.approx(np.mean([p == g for p, g in pairs]))


@pytest.mark.parametrize(
    ("prediction", "gold", "error"),
    [
        ("4", "4", 0),
        (" 4.0 ", "5", 1),
        ("4.4", "4", 0.4),  # nothing is rounded
        ("9", "5", 4),  # nothing is clamped
        ("-1", "5", 6),
        ("0", "1", 1),
        ("4.0", "4", 0),
        ("4", " 4\n", 0),
        ("+4", "4", 0),
        ("4e0", "4", 0),
        ("1_0", "5", 5),  # what Python reads, and so LaMP: 10
        ("\uff14", "4", 0),  # a full-width 4 as well
        ("4,0", "4", 3),  # not a number: 1 is farther than 5
        ("4/5", "4", 3),
        ("4 stars", "2", 3),
        ("   ", "1", 4),
        ("None", "5", 4),
        ("four", "1", 4),
        ("", "2", 3),
        ("?", "3", 2),  # a gold of 3 gives 5
        ("?", "4", 3),
        ("?", "5", 4),
    ],
)
def test_rating_by_hand(prediction: str, gold: str, error: float) -> None:
    result = scores(RATINGS, [prediction, "1"], [gold, "1"])
    assert result["mae"] == pytest.approx(error / 2)
    assert result["rmse"] == pytest.approx(math.sqrt(error**2 / 2))


@pytest.mark.parametrize(
    ("prediction", "mae", "rmse"),
    [
        ("nan", math.nan, math.nan),
        (" -NaN ", math.nan, math.nan),
        ("inf", math.inf, math.inf),
        ("-Infinity", math.inf, math.inf),
        ("1e400", math.inf, math.inf),
        ("1e200", 5e199, math.inf),  # its square is beyond a float
    ],
)
def test_what_float_reads_is_a_rating(prediction: str, mae: float, rmse: float) -> None:
    result = scores(RATINGS, [prediction, "1"], ["3", "1"])
    assert result == {
        "mae": pytest.approx(mae, nan_ok=True),
        "rmse": pytest.approx(rmse, nan_ok=True),
    }


@pytest.mark.parametrize(
    ("task", "rules", "expected"),
    [
        # LaMP strips and looks up exactly; a sentence around a label is none.
        (MOVIES, "lamp", ["4", "a", "nan", "number", "sentence", "upper"]),
        (MOVIES, "mta_published", ["4", "a", "nan", "number", "sentence", "upper"]),
        # LaMP takes what float() reads; MTA's published scorer takes no nan.
        (RATINGS, "lamp", ["a", "sentence", "tag", "upper"]),
        (RATINGS, "mta_published", ["a", "nan", "sentence", "tag", "upper"]),
        # Any text is a title.
        (TITLES, "lamp", []),
    ],
)
def test_answers_that_are_no_label(task: LampTask, rules: Rules, expected: list[str]) -> None:
    answers = {
        "tag": " dark comedy\n",
        "sentence": "The movie is a comedy, based on",
        "upper": "Comedy",
        "a": "",
        "number": "9.5",
        "4": " 4 ",
        "nan": "nan",
    }
    assert unlabelled(task, answers, rules) == expected


def test_rouge_by_hand() -> None:
    # Unigrams: 2 of 3 predicted, 2 of 4 gold -> F 4/7; longest common subsequence 1 -> 2/7.
    # "models" is not "model": no stemming.
    predicted = ["model language big", "models"]
    assert scores(TITLES, predicted, ["A big language system", "model"]) == {
        "rouge1": pytest.approx((4 / 7 + 0) / 2),
        "rougeL": pytest.approx((2 / 7 + 0) / 2),
    }


@pytest.mark.parametrize(
    ("prediction", "rouge1", "rouge_l"),
    [
        ("", 0, 0),
        (" \n", 0, 0),
        ("...", 0, 0),  # no letter or digit, no word
        ("nan", 0, 0),
        ("  DEEP, learning!\n", 1, 1),  # case, signs and spaces do not count
        ("deep-learning", 1, 1),  # a hyphen parts words
        ("learning deep", 1, 1 / 2),  # the order counts for ROUGE-L: 1 of 2
        ("deep deep", 1 / 2, 1 / 2),  # a word is found as often as it stands in the gold
        ("deep", 2 / 3, 2 / 3),  # precision 1, recall 1/2
        ("learn deeply", 0, 0),  # no stemming
        ("d\u00e9ep", 0, 0),  # letters beyond a-z part words too: "d", "ep"
    ],
)
def test_rouge_of_odd_answers(prediction: str, rouge1: float, rouge_l: float) -> None:
    result = scores(TITLES, [prediction, "x"], ["deep learning", "y"])
    assert result == {
        "rouge1": pytest.approx(rouge1 / 2),
        "rougeL": pytest.approx(rouge_l / 2),
    }


@pytest.mark.parametrize(
    ("prediction", "gold", "rouge1", "rouge_l"),
    [
        ("भारत ने मैच जीता", "भारत ने मैच जीता", 1, 1),
        ("今天天气好", "今天天气好", 1, 1),
        # 2 of 3 words predicted, 2 of 4 in the gold, in order.
        ("भारत मैच हारा", "भारत ने मैच जीता", 4 / 7, 4 / 7),
        # Vowel signs are no gaps: without them दिन and दान would share both letters.
        ("दिन", "दान", 0, 0),
        # 3 of 3 characters, 3 of 5; in order 2: 今天.
        ("好今天", "今天天气好", 6 / 8, 4 / 8),
        ("STRASSE, Café", "straße cafe\u0301", 1, 1),
        ("deep-learning models", "Deep learning", 4 / 5, 4 / 5),
        ("", "今天", 0, 0),
    ],
)
def test_rouge_of_any_script(prediction: str, gold: str, rouge1: float, rouge_l: float) -> None:
    given, wanted = {"0": prediction}, {"0": gold}
    result = score(TITLES, given, wanted, "unicode")
    assert result == {"rouge1": pytest.approx(rouge1), "rougeL": pytest.approx(rouge_l)}
    scored = ScoredAnswers.of(TITLES, wanted, {"0": "g"}, {"m": given}, "s", "unicode")
    points = intervals(bootstrap(scored, seed=0, resamples=4))["m"]
    assert {metric: points[metric]["point"] for metric in result} == result


def test_golds_without_a_word() -> None:
    """LaMP's words are of a to z and digits: identical headlines of others score 0, and count."""
    golds = ["भारत जीता", "今天", "iPhone 发布", "2024", "!", "Ёлка", "é"]
    same = score(TITLES, {"0": golds[0]}, {"0": golds[0]})
    assert same == {"rouge1": 0, "rougeL": 0}
    assert golds_without_token(TITLES, golds) == 5
    assert golds_without_token(TITLES, golds, "mta_published") == 5
    assert golds_without_token(TITLES, golds, "unicode") == 1
    assert golds_without_token(MOVIES, golds) == 0


def test_columns_are_by_sorted_id_and_add_up() -> None:
    # Whether it counts, then per label hits and uses; comedy is label 2, action 3.
    golds = {"b": "comedy", "a": "action"}
    columns = example_columns(MOVIES, {"a": "comedy", "b": "comedy"}, golds)
    assert np.argwhere(columns).tolist() == [[0, 0], [0, 6], [0, 8], [1, 0], [1, 5], [1, 6]]
    assert columns[1, 6] == 2
    # Twice everything is the same score; an array of sums gives an array of metrics.
    sums = columns.sum(axis=0)
    twice = from_sums(MOVIES, np.stack([sums, 2 * sums]), np.array([2.0, 4.0]))
    assert twice["accuracy"].tolist() == [0.5, 0.5]
    assert twice["macro_f1"] == pytest.approx([2 / 3 / 15] * 2)


def test_ids_differ() -> None:
    """Ids are not stripped."""
    for predicted in ({"a": "x", "c": "x"}, {"a ": "x"}, {}):
        with pytest.raises(ValueError, match="must have the same ids"):
            score(MOVIES, predicted, {"a": "comedy"})


def test_golds_json() -> None:
    assert golds_json(get_task("LaMP-2N"), {"b": "x", "a": "y"}) == {
        "task": "LaMP_2",
        "golds": [{"id": "b", "output": "x"}, {"id": "a", "output": "y"}],
    }
    assert golds_json(TITLES, {})["task"] == "LaMP_5"


@pytest.mark.parametrize("name", TASKS)
def test_a_submission_is_what_an_outputs_file_is(name: str, tmp_path: Path) -> None:
    """What is exported, put in the place of a split's outputs, is read back id by id."""
    write_official(tmp_path, name, users=4, items=3)
    task, outputs = get_task(name), tmp_path / "dev_outputs.json"
    assert json.loads(outputs.read_text())["task"] == golds_json(task, {})["task"]
    answers = (*task.labels, "5") if task.labels else ('ein \u00dc, \n"zwei"', "b", "c")
    predictions = {str(n): answers[n % 2] for n in (3, 1, 0, 2)}
    outputs.write_text(json.dumps(golds_json(task, predictions)), encoding="utf-8")
    users = read_users(tmp_path, task).users
    found = {query["id"]: query["gold"] for (query,) in users["query"].to_list()}
    assert found == predictions

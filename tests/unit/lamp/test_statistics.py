"""Intervals: against scipy, against scoring every draw anew, in closed form, and their coverage."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks.lamp.statistics as statistics
from tasks.lamp.definitions import LampTask
from tasks.lamp.statistics import (
    ScoredAnswers,
    bootstrap,
    difference,
    differences,
    intervals,
    mean_over,
    multiplicities,
)
from tests.unit.lamp.scoring import score
from tests.unit.lamp.statistics_case import (
    ANSWERS,
    CEILING,
    FLOOR,
    MODEL,
    MOVIES,
    RATINGS,
    TITLES,
    cell,
    hits,
    random_queries,
    world,
)


@pytest.mark.parametrize("task", [MOVIES, RATINGS, TITLES], ids=lambda task: task.name)
def test_every_draw_equals_scoring_its_queries_anew(task: LampTask) -> None:
    """The queries of the drawn groups, repeated as drawn, go through `metrics.score`."""
    queries = random_queries(task, groups=7, methods=2)
    scored = cell(task, queries, ("m", "n"))
    resampled = bootstrap(scored, seed=3, resamples=20)
    about = ["3", task.name, "s", *scored.groups]
    weights = np.concatenate(list(multiplicities(about, 7, 20)))
    assert weights.sum(axis=1).tolist() == [7.0] * 20
    for draw, row in enumerate(weights):
        repeated = [
            query
            for group, times in zip(scored.groups, row, strict=True)
            for query in queries[group] * int(times)
        ]
        golds = {str(n): query[0] for n, query in enumerate(repeated)}
        for number in (0, 1):
            given = {str(n): query[1 + number] for n, query in enumerate(repeated)}
            for metric, value in score(task, given, golds).items():
                assert resampled.draws[metric][draw, number] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("task", [MOVIES, RATINGS, TITLES], ids=lambda task: task.name)
def test_points_are_those_of_score_to_the_last_bit(task: LampTask) -> None:
    queries = random_queries(task, groups=11, methods=3)
    found = intervals(bootstrap(cell(task, queries, ("a", "b", "c")), seed=0, resamples=10))
    for number, method in enumerate("abc"):
        expected = score(
            task,
            {f"{g} {n}": q[1 + number] for g, qs in queries.items() for n, q in enumerate(qs)},
            {f"{g} {n}": q[0] for g, qs in queries.items() for n, q in enumerate(qs)},
        )
        for metric, value in expected.items():
            assert found[method][metric]["point"] == value


def test_intervals_agree_with_scipy() -> None:
    """scipy.stats.bootstrap, paired, percentile, of sums and counts per group.

    Ends of two bootstraps of 4,000 draws differ by about 2 % of the width (standard error of a
    2.5 % quantile of a normal, sqrt(.025 * .975 / 4000) / .0585 standard deviations, times
    sqrt(2)); 10 % are allowed.
    """
    stats = pytest.importorskip("scipy.stats")
    scored = cell(RATINGS, random_queries(RATINGS, groups=40, methods=2), ("m", "n"))
    resampled = bootstrap(scored, seed=1, resamples=4000)

    def mae(row: int) -> Any:
        return lambda e, f, c, axis: (e, f)[row].sum(axis=axis) / c.sum(axis=axis)

    def between(e: Any, f: Any, c: Any, axis: int) -> Any:
        return (e - f).sum(axis=axis) / c.sum(axis=axis)

    errors = [scored.sums[:, row, 0] for row in (0, 1)]
    for got, statistic in (
        (intervals(resampled)["m"]["mae"], mae(0)),
        (intervals(resampled)["n"]["mae"], mae(1)),
        (difference(resampled, "m", "n")["mae"], between),
    ):
        expected = stats.bootstrap(
            (*errors, scored.counts), statistic, paired=True, vectorized=True, method="percentile",
            n_resamples=4000, rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
        width = expected.high - expected.low
        assert got["lo"] == pytest.approx(expected.low, abs=0.1 * width)
        assert got["hi"] == pytest.approx(expected.high, abs=0.1 * width)


def test_variance_in_closed_form() -> None:
    """Groups of one query, 12 of 40 right: the bootstrap's variance of the mean is p (1 - p) / G.

    Of 20,000 draws the variance is known to 1 % (sqrt(2 / B)).
    """
    scored = cell(MOVIES, hits({f"g{n:02d}": [n < 12] for n in range(40)}))
    draws = bootstrap(scored, seed=2, resamples=20_000).draws["accuracy"]
    assert draws.var() == pytest.approx(0.3 * 0.7 / 40, rel=0.05)
    assert draws.mean() == pytest.approx(0.3, abs=0.005)


def test_three_siblings_count_once() -> None:
    """24 authors of three copies each: taken for 72 users, intervals are sqrt(3) too narrow."""
    right = [n % 3 == 0 for n in range(24)]
    authors = cell(MOVIES, hits({f"a{n:02d}": [hit] * 3 for n, hit in enumerate(right)}))
    windows = cell(
        MOVIES, hits({f"a{n:02d}-{w}": [hit] for n, hit in enumerate(right) for w in range(3)})
    )
    wide, narrow = (bootstrap(scored, 0, 20_000) for scored in (authors, windows))
    assert (wide.groups, narrow.groups, wide.queries, narrow.queries) == (24, 72, 72, 72)
    ratio = wide.draws["accuracy"].std() / narrow.draws["accuracy"].std()
    assert ratio == pytest.approx(math.sqrt(3), rel=0.03)
    widths = [
        found["hi"] - found["lo"]
        for found in (intervals(resampled)["m"]["accuracy"] for resampled in (wide, narrow))
    ]
    # The ends are multiples of 1 / 24 and 1 / 72.
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(3), rel=0.15)


def test_methods_that_answer_alike_differ_by_exactly_nothing() -> None:
    queries = random_queries(TITLES, groups=9, methods=1)
    alike = {group: [(*q, q[1], q[1]) for q in qs] for group, qs in queries.items()}
    resampled = bootstrap(cell(TITLES, alike, ("a", "b", "c")), seed=0, resamples=500)
    for opponent in "abc":
        for metric in ("rouge1", "rougeL", "score"):
            assert difference(resampled, "a", opponent)[metric] == {
                "point": 0.0,
                "lo": 0.0,
                "hi": 0.0,
                "holds": False,
            }


def test_pairs_see_what_the_intervals_of_each_do_not() -> None:
    """20 authors, half easy; `b` is right where `a` is and in two more of each author's queries.

    The accuracies .4 and .6 overlap widely; the difference is .2 in every author, so in every draw.
    """
    queries = {
        f"g{n:02d}": [
            ("comedy", *["comedy" if q < right else "action" for right in (base, base + 2)])
            for q in range(10)
        ]
        for n, base in enumerate([0, 8] * 10)
    }
    resampled = bootstrap(cell(MOVIES, queries, ("a", "b")), seed=0)
    found = intervals(resampled)
    hi, lo = found["a"]["accuracy"]["hi"], found["b"]["accuracy"]["lo"]
    assert hi is not None
    assert lo is not None
    assert hi > lo
    got = differences(resampled, ["a"])
    assert got["a"] == {}
    values = got["b"]["a"]["accuracy"]
    assert values == {"point": 0.2, "lo": 0.2, "hi": 0.2, "holds": True}
    assert difference(resampled, "a", "b")["accuracy"]["holds"] is True


def test_coverage() -> None:
    """200 data sets of 40 authors with 5 queries; every author has a hit rate of its own.

    Rates are uniform on 0..1, so the truth is .5. At 95 % (somewhat less with 40 groups) 190 of
    200 intervals hold it, give or take 3; from 178 to 198 is allowed (four standard deviations
    down). Queries taken for independent: an author's mean has variance 1/12 + 1/30 = .117 where
    five queries alone would have .05, so intervals are .65 as wide and hold it in 80 %.
    """
    covered = {"authors": 0, "queries": 0}
    for number in range(200):
        random = np.random.default_rng([7, number])
        right = random.random((40, 5)) < random.random((40, 1))
        for kind in covered:
            groups: dict[str, list[int]] = {}
            for author, row in enumerate(right):
                for query, hit in enumerate(row):
                    name = f"{author}" if kind == "authors" else f"{author}-{query}"
                    groups.setdefault(name, []).append(int(hit))
            scored = cell(MOVIES, hits(groups), sample=str(number))
            found = intervals(bootstrap(scored, 0, 400))["m"]["accuracy"]
            lo, hi = found["lo"], found["hi"]
            assert lo is not None
            assert hi is not None
            covered[kind] += lo <= 0.5 <= hi
    assert 178 <= covered["authors"] <= 198
    assert 140 <= covered["queries"] <= 176


rows_of = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from(ANSWERS["LaMP-5"])), min_size=1, max_size=12
)


@settings(max_examples=40, deadline=None)
@given(rows_of, st.randoms(use_true_random=False))
def test_the_order_of_queries_changes_nothing(rows: list[tuple[str, str]], random: Any) -> None:
    def run(order: list[int]) -> Any:
        golds = {f"q{n}": "a model of big language" for n in order}
        groups = {f"q{n}": rows[n][0] for n in order}
        scored = ScoredAnswers.of(
            TITLES, golds, groups, {"m": {f"q{n}": rows[n][1] for n in order}}, "s"
        )
        return intervals(bootstrap(scored, 0, 20))

    order = list(range(len(rows)))
    expected = run(order)
    random.shuffle(order)
    assert run(order) == expected


def test_the_seed_decides_and_blocks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = cell(TITLES, random_queries(TITLES, 6, 1))
    first = bootstrap(scored, 0, 50).draws["rougeL"]
    assert (bootstrap(scored, 1, 50).draws["rougeL"] != first).any()
    monkeypatch.setattr(statistics, "DRAWN_AT_ONCE", 42)  # blocks of 7 draws
    assert (bootstrap(scored, 0, 50).draws["rougeL"] == first).all()


def test_fewer_than_two_groups_have_no_interval() -> None:
    one = bootstrap(cell(MOVIES, hits({"g": [1, 1, 0, 0]}, 2), ("a", "b")), seed=0)
    assert intervals(one)["a"]["accuracy"] == {"point": 0.5, "lo": None, "hi": None}
    nothing = {"point": 0.0, "lo": None, "hi": None, "holds": None}
    assert difference(one, "a", "b")["accuracy"] == nothing
    two = bootstrap(cell(MOVIES, hits({"g": [1, 0], "h": [1, 0]}, 2), ("a", "b")), seed=0)
    assert intervals(two)["a"]["accuracy"] == {"point": 0.5, "lo": 0.5, "hi": 0.5}
    both = mean_over([one, two])
    assert intervals(both)["b"]["score"] == {"point": 0.5, "lo": None, "hi": None}


@pytest.mark.parametrize("answer", ["nan", "inf", "-inf", "1e200", "1e308"])
def test_numbers_that_json_does_not_have(answer: str) -> None:
    """float() reads "nan" and "inf"; the square of 1e200 is inf, as is 1e308 twice."""
    golds = {f"q{n}": "3" for n in range(6)}
    good = dict.fromkeys(golds, "4")
    scored = ScoredAnswers.of(
        RATINGS,
        golds,
        {query_id: query_id for query_id in golds},
        {"bad": good | {"q0": answer, "q1": answer}, "good": good},
        "s",
    )
    resampled = bootstrap(scored, seed=0, resamples=200)
    found = intervals(resampled)
    none = {"point": None, "lo": None, "hi": None}
    assert found["bad"]["rmse"] == none
    assert (found["bad"]["mae"] == none) == (answer != "1e200")
    assert found["good"]["rmse"] == {"point": 1.0, "lo": 1.0, "hi": 1.0}
    assert difference(resampled, "bad", "good")["rmse"] == none | {"holds": None}
    assert found["good"]["score"]["point"] == 0.75
    json.dumps([found, differences(resampled, ["good"])], allow_nan=False)
    json.dumps(intervals(mean_over([resampled, resampled])), allow_nan=False)


def test_share_of_attainable_by_hand() -> None:
    """Of 100 queries 30, 90 and 60 are right: (.6 - .3) / (.9 - .3) = .5; redone in every draw."""
    resampled = world({"nonpersonal": FLOOR, "bayes": CEILING, "m": MODEL})
    found = intervals(resampled)
    assert found["m"]["share_of_attainable"]["point"] == pytest.approx(0.5)
    for name, value in (("nonpersonal", 0.0), ("bayes", 1.0)):
        assert found[name]["share_of_attainable"] == {"point": value, "lo": value, "hi": value}
    low, high, model = resampled.draws["accuracy"].T
    expected = np.percentile((model - low) / (high - low), [2.5, 97.5])
    got = found["m"]["share_of_attainable"]
    assert [got["lo"], got["hi"]] == pytest.approx(expected.tolist(), abs=1e-12)
    assert "share_of_attainable" not in intervals(world({"bayes": CEILING, "m": MODEL}))["m"]


def test_share_of_attainable_of_ratings_is_one_of_mae() -> None:
    """Errors 2, 1 and 0: half of what there is to gain, whether as -mae or as 1 - mae / 4."""
    methods = ("nonpersonal", "m", "bayes")
    queries = {f"g{n}": [("3", "5", "4", "3")] for n in range(4)}
    found = intervals(bootstrap(cell(RATINGS, queries, methods), seed=0))["m"]
    assert found["share_of_attainable"] == {"point": 0.5, "lo": 0.5, "hi": 0.5}
    assert found["score"] == {"point": 0.75, "lo": 0.75, "hi": 0.75}


def test_share_without_room_is_none() -> None:
    """Nothing to attain: no share. Room in some draws only: a share without an interval."""
    nothing = {"point": None, "lo": None, "hi": None}
    for bayes in (FLOOR, [1] * 10):
        none = world({"nonpersonal": FLOOR, "bayes": bayes, "m": MODEL})
        assert intervals(none)["m"]["share_of_attainable"] == nothing
    # Room .01 in total, and below 0 in draws that hold the first author often.
    some = world({"nonpersonal": [5] * 10, "bayes": [1] + [6] * 5 + [5] * 4, "m": MODEL})
    got = intervals(some)["m"]["share_of_attainable"]
    assert got == {"point": pytest.approx((0.6 - 0.5) / 0.01), "lo": None, "hi": None}

"""Methods compared in one cell and over cells, from `score` results made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tasks.compare import compare, compared, overall, read_draws
from tasks.config.run import resolve
from tasks.lamp.metrics import Rules
from tasks.lamp.statistics import RESAMPLES
from tasks.results.models import Answers, Compared, Difference, Estimate, Prepared
from tasks.results.store import store
from tests.unit.stages import answered
from tests.unit.stages.answered import BASE, MTA, QUERIES, USERS
from tests.unit.stages.pipeline import stage_keys

pytestmark = pytest.mark.usefixtures("where")

PREDICTORS = {"nonpersonal": BASE, "bayes": MTA | {"e": "action"}, "oracle": MTA | {"e": "action"}}


def prepared(optimum: dict[str, dict[str, str]] | None = None) -> Prepared:
    table = None
    if optimum:
        # A query that no method was asked stands there too.
        columns = {name: [*own.values(), "comedy"] for name, own in optimum.items()}
        # In another order than the answers'.
        table = pl.DataFrame({"query_id": [*QUERIES, "unasked"], **columns}).reverse()
    return answered.prepared("LaMP-2M", USERS, table)


def batch_of(predictions: dict[str, str]) -> Answers:
    return answered.answered(QUERIES, predictions)


def run(
    methods: dict[str, dict[str, str]],
    optimum: dict[str, dict[str, str]] | None = None,
    **given: Any,
) -> Compared:
    config = resolve(given)
    answers = {name: (batch_of(own),) for name, own in methods.items()}
    return compared(config.for_task("LaMP-2M", config.seed), prepared(optimum), answers)


def key(*arguments: Any, **given: Any) -> str:
    """The stage's cache key in such a run."""
    with stage_keys() as keys:
        run(*arguments, **given)
    return keys["compare"][0]


def test_two_methods_by_hand() -> None:
    """2 and 4 of 5 are right. Of g1 1/2 and 2/2, of g2 (two users) 1/2 and 2/2, of g4 0 and 0.

    Three groups drawn with replacement: g4 alone (accuracy 0) has a chance of 1/27 = 3.7 %, more
    than 2.5 %, so 0 is the lower end; g1 and g2 alone are drawn with chance 8/27, so the upper
    ends are 0.5 and 1. The difference is 0 in the first case, so it does not hold.
    """
    value = run({"base": BASE, "mta": MTA})
    assert (value.groups, value.queries) == (3, 5)
    assert value.methods == ("base", "mta")
    assert value.intervals["base"]["accuracy"] == Estimate(point=0.4, lo=0.0, hi=0.5)
    assert value.intervals["mta"]["accuracy"] == Estimate(point=0.8, lo=0.0, hi=1.0)
    assert value.intervals["mta"]["score"] == value.intervals["mta"]["accuracy"]
    # Base: comedy 2 tp of 5 + 2 uses; of fifteen labels.
    f1 = value.intervals["base"]["macro_f1"].point
    assert f1 == pytest.approx(4 / 7 / 15)
    # Each against every other one.
    assert {name: list(own) for name, own in value.differences.items()} == {
        "base": ["mta"],
        "mta": ["base"],
    }
    found = value.differences["mta"]["base"]["accuracy"]
    assert found.point == pytest.approx(0.4)
    assert found == Difference(point=found.point, lo=0.0, hi=0.5, holds=False)
    assert "share_of_attainable" not in value.intervals["mta"]


def test_batches_are_one_and_scores_are_in_lamps_format() -> None:
    """Two batches, a to c and d to e; LaMP's submissions name the task by its number."""
    parts = [{query: QUERIES[query] for query in own} for own in ("abc", "de")]
    batches = tuple(answered.answered(own, MTA) for own in parts)
    value = compare(prepared(), {"mta": batches}, "lamp", "given")
    whole = run({"mta": MTA}, data="given")
    assert value.intervals == whole.intervals
    (scored,) = value.scored
    assert (scored.method, scored.users, scored.queries) == ("mta", 4, 5)
    assert value.intervals["mta"]["accuracy"].point == 0.8
    table = pl.read_parquet(store().path(scored.predictions))
    assert dict(table.select("query_id", "prediction").iter_rows()) == MTA
    golds = json.loads(store().path(scored.golds).read_text())
    assert {one["id"]: one["output"] for one in golds["golds"]} == MTA


def test_the_optimum_is_scored_where_it_is_known() -> None:
    """Non-personal 0.4, Bayes 1: mta has (0.8 - 0.4) / (1 - 0.4) = 2/3 of what is attainable."""
    value = run({"base": BASE, "mta": MTA}, PREDICTORS)
    assert value.methods == ("base", "mta", "nonpersonal", "bayes", "oracle")
    points = {name: own["accuracy"].point for name, own in value.intervals.items()}
    assert points == {"base": 0.4, "mta": 0.8, "nonpersonal": 0.4, "bayes": 1.0, "oracle": 1.0}
    share = {n: own["share_of_attainable"].point for n, own in value.intervals.items()}
    assert share["mta"] == pytest.approx(2 / 3)
    assert (share["base"], share["bayes"]) == (0.0, 1.0)
    # The optimum is compared with methods, no method with the optimum.
    assert sorted(value.differences["oracle"]) == ["base", "mta"]
    assert sorted(value.differences["mta"]) == ["base"]
    # It is no answer of a model, so it has no file of scores.
    assert [one.method for one in value.scored] == ["base", "mta"]


def test_the_share_of_answers_that_are_no_label() -> None:
    """The case counts, a sentence is no label; spaces around one are nothing."""

    def share(lamp_task: str, rules: Rules, said: list[str], gold: str) -> float | None:
        queries = {f"q{n}": ("u1", gold) for n in range(len(said))}
        given = answered.answered(queries, dict(zip(queries, said, strict=True)))
        users = answered.prepared(lamp_task, USERS)
        return compare(users, {"base": (given,)}, rules, "given").scored[0].no_label

    words = ["Comedy", " comedy ", "It is a comedy, based on", "", "4"]
    assert share("LaMP-2M", "lamp", words, "comedy") == 0.8
    # Of ratings what float() reads is one, by the rules in force.
    ratings = ["4", "4.5", "nan", "four"]
    assert share("LaMP-3", "lamp", ratings, "4") == 0.25
    assert share("LaMP-3", "mta_published", ratings, "4") == 0.5
    # A headline may be anything.
    assert share("LaMP-4", "lamp", words, "A title") is None


def test_what_it_depends_on() -> None:
    methods = {"base": BASE, "mta": MTA}
    first = key(methods)
    assert key(methods, stacking={"rank": 9}) == first
    others = {
        key({"base": BASE, "mta": BASE}),
        key(methods, PREDICTORS),
        key(methods, seed=1),
        key(methods, scoring={"metrics": "mta_published"}),
    }
    assert len(others | {first}) == 5


def test_draws_are_read_as_they_were_written() -> None:
    """The intervals say it: they are the draws' percentiles."""
    cell = run({"base": BASE, "mta": MTA}, PREDICTORS)
    drawn = read_draws(cell)
    assert drawn.methods == cell.methods
    assert (drawn.groups, drawn.queries) == (3, 5)
    assert set(drawn.points) == set(drawn.draws) == set(cell.intervals["mta"])
    for number, method in enumerate(drawn.methods):
        for metric, points in drawn.points.items():
            wanted = cell.intervals[method][metric]
            assert drawn.draws[metric].shape == (RESAMPLES, 5)
            assert points[number] == wanted.point
            if wanted.lo is not None:
                ends = np.percentile(drawn.draws[metric][:, number], [2.5, 97.5])
                assert ends.tolist() == [wanted.lo, wanted.hi]


def test_the_mean_over_two_cells() -> None:
    """Worlds of two seeds, 0.8 and 0.4 for mta: 0.6, and half of 2/3 + 0 of the attainable.

    The draws are those of the cells, averaged one by one.
    """

    def worlds() -> tuple[Compared, ...]:
        answers: list[dict[str, Any]] = [{"mta": MTA}, {"mta": BASE, "rag": BASE}]
        return tuple(
            run({"base": BASE} | own, PREDICTORS, seed=seed) for seed, own in enumerate(answers)
        )

    cells = worlds()
    value = overall(cells)
    assert (value.cells, value.groups, value.queries) == (2, 6, 10)
    # rag is in one cell only.
    assert value.methods == ("base", "mta", "nonpersonal", "bayes", "oracle")
    assert value.intervals["mta"].keys() == {"score", "share_of_attainable"}
    assert value.intervals["mta"]["score"].point == pytest.approx(0.6)
    assert value.intervals["mta"]["share_of_attainable"].point == pytest.approx(1 / 3)
    first, second = (read_draws(cell) for cell in cells)
    both = (first.draws["score"][:, 1] + second.draws["score"][:, 1]) / 2
    lo, hi = np.percentile(both, [2.5, 97.5])
    found = value.intervals["mta"]["score"]
    assert found.lo == pytest.approx(lo, rel=1e-9)
    assert found.hi == pytest.approx(hi, rel=1e-9)
    assert value.differences["mta"]["base"]["score"].point == pytest.approx(0.2)
    assert overall.key(cells) == overall.key(worlds())
    assert overall.key(cells) != overall.key(cells[:1])


def draws_of(**given: Any) -> np.ndarray:
    return read_draws(run({"mta": MTA}, **given)).draws["accuracy"]


def test_the_same_users_are_drawn_alike(tmp_path: Path) -> None:
    """A world of another seed has other users. A file's are the same under another training seed,
    and wherever the file lies."""
    world, other_world = draws_of(), draws_of(seed=1)
    assert not np.array_equal(world, other_world)
    file = draws_of(data=str(tmp_path / "a"), seed=2)
    assert np.array_equal(file, draws_of(data=str(tmp_path / "a"), seed=3))
    assert np.array_equal(file, draws_of(data=str(tmp_path / "b"), seed=4))
    cells = [run({"mta": MTA}, data=str(tmp_path / "a"), seed=seed) for seed in (2, 3)]
    mean = overall(tuple(cells))
    assert (mean.groups, mean.queries) == (3, 10)
    (wanted, found) = (one.intervals["mta"]["score"].model_dump() for one in (cells[0], mean))
    assert found == pytest.approx(wanted)

"""Methods compared in one cell and over cells, from `score` results made by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tasks.compare import compare, overall, read_draws
from tasks.config import resolve
from tasks.lamp.statistics import RESAMPLES
from tasks.prepare import OPTIMUM_FILE
from tasks.store.artifacts import Store
from tasks.store.pieces import digest
from tests.unit.stages.users import result

# user -> group; u2 and u3 share content, so three groups.
USERS = {"u1": "g1", "u2": "g2", "u3": "g2", "u4": "g4"}
# query -> user, gold. Two queries of u1, one of the others.
QUERIES = {
    "a": ("u1", "comedy"),
    "b": ("u1", "action"),
    "c": ("u2", "comedy"),
    "d": ("u3", "classic"),
    "e": ("u4", "action"),
}
BASE = dict.fromkeys(QUERIES, "comedy")  # right: a, c
MTA = BASE | {"b": "action", "d": "classic"}  # right: a, b, c, d
PREDICTORS = {"nonpersonal": BASE, "bayes": MTA | {"e": "action"}, "oracle": MTA | {"e": "action"}}


def handed(piece: Any) -> dict[str, Any]:
    return {"ref": piece.ref, "value": piece.value, "notes": piece.notes, "cached": piece.cached}


def prepared(where: Store, optimum: dict[str, dict[str, str]] | None = None) -> dict[str, Any]:
    def make(out: Path) -> dict[str, Any]:
        pl.DataFrame({"user_id": list(USERS), "group": list(USERS.values())}).write_parquet(
            out / "few_shot.parquet"
        )
        if optimum:
            # A query that no method was asked stands there too.
            columns = {name: [*own.values(), "comedy"] for name, own in optimum.items()}
            table = pl.DataFrame({"query_id": [*QUERIES, "unasked"], **columns})
            # In another order than the scores'.
            table.reverse().write_parquet(out / OPTIMUM_FILE)
        return {}

    return handed(where.get("prepare", digest(["prepared", optimum]), make))


def scored(where: Store, method: str, predictions: dict[str, str]) -> dict[str, Any]:
    def make(out: Path) -> dict[str, Any]:
        rows = [
            {"user_id": user, "query_id": query, "gold": gold, "prediction": predictions[query]}
            for query, (user, gold) in QUERIES.items()
        ]
        pl.DataFrame(rows).write_parquet(out / "predictions.parquet")
        return {}

    return handed(where.get("score", digest([method, predictions]), make))


def run(
    where: Store,
    methods: dict[str, dict[str, str]],
    optimum: dict[str, dict[str, str]] | None = None,
    **given: Any,
) -> dict[str, Any]:
    config = resolve(given).model_dump(mode="json")
    scores = {name: scored(where, name, own) for name, own in methods.items()}
    return result(compare.fn(config, "LaMP-2M", prepared(where, optimum), scores))


def test_two_methods_by_hand(where: Store) -> None:
    """2 and 4 of 5 are right. Of g1 1/2 and 2/2, of g2 (two users) 1/2 and 2/2, of g4 0 and 0.

    Three groups drawn with replacement: g4 alone (accuracy 0) has a chance of 1/27 = 3.7 %, more
    than 2.5 %, so 0 is the lower end; g1 and g2 alone are drawn with chance 8/27, so the upper
    ends are 0.5 and 1. The difference is 0 in the first case, so it does not hold.
    """
    value = run(where, {"base": BASE, "mta": MTA})["value"]
    assert (value["groups"], value["queries"]) == (3, 5)
    assert value["methods"] == ["base", "mta"]
    assert value["intervals"]["base"]["accuracy"] == {"point": 0.4, "lo": 0.0, "hi": 0.5}
    assert value["intervals"]["mta"]["accuracy"] == {"point": 0.8, "lo": 0.0, "hi": 1.0}
    assert value["intervals"]["mta"]["score"] == value["intervals"]["mta"]["accuracy"]
    # Base: comedy 2 tp of 5 + 2 uses; of fifteen labels.
    f1 = value["intervals"]["base"]["macro_f1"]["point"]
    assert f1 == pytest.approx(4 / 7 / 15)
    # Each against the opponents that were run, never against itself.
    assert {name: list(own) for name, own in value["differences"].items()} == {
        "base": ["mta"],
        "mta": ["base"],
    }
    found = value["differences"]["mta"]["base"]["accuracy"]
    assert found == {"point": pytest.approx(0.4), "lo": 0.0, "hi": 0.5, "holds": False}
    assert "share_of_attainable" not in value["intervals"]["mta"]


def test_the_optimum_is_scored_where_it_is_known(where: Store) -> None:
    """Non-personal 0.4, Bayes 1: mta has (0.8 - 0.4) / (1 - 0.4) = 2/3 of what is attainable."""
    value = run(where, {"base": BASE, "mta": MTA}, PREDICTORS)["value"]
    assert value["methods"] == ["base", "mta", "nonpersonal", "bayes", "oracle"]
    points = {name: own["accuracy"]["point"] for name, own in value["intervals"].items()}
    assert points == {"base": 0.4, "mta": 0.8, "nonpersonal": 0.4, "bayes": 1.0, "oracle": 1.0}
    share = {n: own["share_of_attainable"]["point"] for n, own in value["intervals"].items()}
    assert share["mta"] == pytest.approx(2 / 3)
    assert (share["base"], share["bayes"]) == (0.0, 1.0)
    # The optimum is compared with methods, no method with the optimum.
    assert sorted(value["differences"]["oracle"]) == ["base", "mta"]
    assert sorted(value["differences"]["mta"]) == ["base"]


def test_found_again_and_what_it_depends_on(where: Store) -> None:
    methods = {"base": BASE, "mta": MTA}
    first = run(where, methods)
    assert run(where, methods, stacking={"rank": 9})["cached"]
    for changed in (
        run(where, {"base": BASE, "mta": BASE}),
        run(where, methods, PREDICTORS),
        run(where, methods, seed=1),
    ):
        assert not changed["cached"]
        assert changed["ref"] != first["ref"]


def test_draws_are_read_as_they_were_written(where: Store) -> None:
    """The intervals say it: they are the draws' percentiles."""
    cell = run(where, {"base": BASE, "mta": MTA}, PREDICTORS)
    drawn = read_draws(where, cell)
    value = cell["value"]
    assert drawn.methods == tuple(value["methods"])
    assert (drawn.groups, drawn.queries) == (3, 5)
    assert set(drawn.points) == set(drawn.draws) == set(value["intervals"]["mta"])
    for number, method in enumerate(drawn.methods):
        for metric, points in drawn.points.items():
            wanted = value["intervals"][method][metric]
            assert drawn.draws[metric].shape == (RESAMPLES, 5)
            assert points[number] == wanted["point"]
            if wanted["lo"] is not None:
                ends = np.percentile(drawn.draws[metric][:, number], [2.5, 97.5])
                assert ends.tolist() == [wanted["lo"], wanted["hi"]]


def test_the_mean_over_two_cells(where: Store) -> None:
    """Worlds of two seeds, 0.8 and 0.4 for mta: 0.6, and half of 2/3 + 0 of the attainable.

    The draws are those of the cells, averaged one by one.
    """
    cells = [
        run(where, {"base": BASE, "mta": answers, **extra}, PREDICTORS, seed=seed)
        for seed, (answers, extra) in enumerate([(MTA, {}), (BASE, {"rag": BASE})])
    ]
    value = result(overall.fn(cells))["value"]
    assert (value["cells"], value["groups"], value["queries"]) == (2, 6, 10)
    # rag is in one cell only.
    assert value["methods"] == ["base", "mta", "nonpersonal", "bayes", "oracle"]
    assert value["intervals"]["mta"].keys() == {"score", "share_of_attainable"}
    assert value["intervals"]["mta"]["score"]["point"] == pytest.approx(0.6)
    assert value["intervals"]["mta"]["share_of_attainable"]["point"] == pytest.approx(1 / 3)
    first, second = (read_draws(where, cell) for cell in cells)
    both = (first.draws["score"][:, 1] + second.draws["score"][:, 1]) / 2
    lo, hi = np.percentile(both, [2.5, 97.5])
    found = value["intervals"]["mta"]["score"]
    assert math.isclose(found["lo"], lo)
    assert math.isclose(found["hi"], hi)
    assert value["differences"]["mta"]["base"]["score"]["point"] == pytest.approx(0.2)
    assert result(overall.fn(cells))["cached"]
    assert not result(overall.fn(cells[:1]))["cached"]


def draws_of(where: Store, **given: Any) -> np.ndarray:
    return read_draws(where, run(where, {"mta": MTA}, **given)).draws["accuracy"]


def test_the_same_users_are_drawn_alike(where: Store, tmp_path: Path) -> None:
    """A world of another seed has other users. A file's are the same under another training seed,
    and wherever the file lies."""
    world, other_world = draws_of(where), draws_of(where, seed=1)
    assert not np.array_equal(world, other_world)
    file = draws_of(where, data=str(tmp_path / "a"), seed=2)
    assert np.array_equal(file, draws_of(where, data=str(tmp_path / "a"), seed=3))
    assert np.array_equal(file, draws_of(where, data=str(tmp_path / "b"), seed=4))
    cells = [run(where, {"mta": MTA}, data=str(tmp_path / "a"), seed=seed) for seed in (2, 3)]
    mean = result(overall.fn(cells))["value"]
    assert (mean["groups"], mean["queries"]) == (3, 10)
    assert mean["intervals"]["mta"]["score"] == pytest.approx(
        cells[0]["value"]["intervals"]["mta"]["score"]
    )

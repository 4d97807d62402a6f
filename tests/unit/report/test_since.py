"""What changed since the last run of the same configuration."""

from __future__ import annotations

import json
import os
from typing import Any

import polars as pl
import pytest

from tasks.report.files import write_run
from tasks.report.page import report_html
from tasks.report.since import ScoreChange, Since, last_run, since
from tasks.results.models import Estimate, Prepared
from tasks.results.run import Cell, Run
from tasks.results.store import Store
from tests.unit.report import cells
from tests.unit.report.cells import anchor, compared, estimate, merging, stored
from tests.unit.report.report_case import HOSTILE, report_case

CONFIG = {"data": "users", "seed": 0, "compute": {"device": "cpu"}}
ABOUT = {"name": "brave-cat", "date": "2026-11-15 23:00"}


def prepared(**roles: dict[str, str]) -> Prepared:
    """Per role the users, each with one item of the given text."""
    kinds = {
        "user_id": pl.String,
        "profile": pl.List(pl.Struct({"text": pl.String, "answer": pl.String})),
        "query": pl.List(pl.Struct({"id": pl.String, "input": pl.String, "gold": pl.String})),
    }

    def table(users: dict[str, str]) -> pl.DataFrame:
        rows = [
            {
                "user_id": user,
                "profile": [{"text": text, "answer": "x"}],
                "query": [{"id": "q", "input": "?", "gold": "x"}],
            }
            for user, text in users.items()
        ]
        return pl.DataFrame(rows, schema=kinds)

    sides = {
        role: stored("prepare", table(roles.get(role, {})))
        for role in ("base", "anchor", "few_shot")
    }
    return cells.users(**sides)


def cell(users: Prepared, scores: dict[str, Estimate], anchors: dict[str, str]) -> Cell:
    intervals = {name: {"score": one} for name, one in scores.items()}
    bank = merging(("mta",), [anchor(name) for name in anchors], trained=anchors)
    return cells.cell(
        compared().model_copy(update={"intervals": intervals}),
        seed=0,
        users=users,
        mergings=(bank,),
    )


def run(*found: Cell, id: str = "now", config: dict[str, Any] = CONFIG, **about: str) -> Run:
    return cells.run(*found, id=id, config=config, **(ABOUT | about))


THEN = {"base": estimate(0.5, 0.25, 0.75), "mta": estimate(0.5, 0.25, 0.75), "bayes": estimate(1.0)}
NOW = {"base": estimate(0.5, 0.25, 0.75), "mta": estimate(0.625, 0.5, 0.75), "bayes": estimate(1.0)}


@pytest.fixture
def before(where: Store) -> Cell:
    users = prepared(few_shot={"u1": "a", "u2": "b", "u3": "c"}, anchor={"a1": "x"})
    one = cell(users, THEN, {"a1": "11", "a2": "22", "a3": "33"})
    assert since(run(one)) is None
    write_run(run(one, id="first"))
    return one


def test_scores_users_and_anchors(before: Cell) -> None:
    users = prepared(few_shot={"u1": "a", "u2": "other", "u4": "d"}, anchor={"a1": "x"})
    found = since(run(cell(users, NOW, {"a1": "11", "a3": "34", "a4": "44"})))
    assert found is not None
    assert found.last == "the run brave-cat of 2026-11-15 23:00"
    assert found.scores == [
        ScoreChange(cell="LaMP-2M", method="base", then=THEN["base"], now=NOW["base"]),
        ScoreChange(cell="LaMP-2M", method="mta", then=THEN["mta"], now=NOW["mta"]),
    ]
    head = "since the run brave-cat of 2026-11-15 23:00: LaMP-2M, "
    assert found.lines() == [
        f"{head}few-shot users: 1 added (u4); 1 removed (u3); 1 changed (u2)",
        f"{head}mta, anchors: 1 new (a4); 1 replaced (a2); 1 trained again (a3)",
        f"{head}mta: score 0.500 [0.250, 0.750] -> 0.625 [0.500, 0.750]",
    ]


def test_nothing_changed(before: Cell) -> None:
    found = since(run(before))
    assert found is not None
    head = "since the run brave-cat of 2026-11-15 23:00: "
    assert found.lines() == [
        f"{head}users and anchors are the same",
        f"{head}no score moved",
    ]


def test_the_same_configuration(before: Cell) -> None:
    """Where it runs decides nothing; all else does. Of several the one that ended last."""
    assert last_run(run(config=CONFIG | {"compute": {"device": "cuda"}})) is not None
    assert last_run(run(config=CONFIG | {"seed": 1})) is None
    assert last_run(run(config=CONFIG | {"more": 1})) is None
    # A run is not its own last one, though it was written down already.
    assert last_run(run(id="first")) is None
    second = write_run(run(before, id="a-second", name="calm-dog"))
    write_run(run(before, id="a-third", config=CONFIG | {"seed": 3}, name="other"))
    folder = second.parent
    (folder / "broken.json").write_text("{")
    (folder / "old.json").write_text(json.dumps({"config": CONFIG, "seeds": {}}))
    for number, name in enumerate(("first", "a-second", "a-third", "broken", "old")):
        os.utime(folder / f"{name}.json", (1000 + number, 1000 + number))
    found = last_run(run())
    assert found is not None
    assert found.name == "calm-dog"


def test_users_of_a_table_that_is_gone(where: Store, before: Cell) -> None:
    """That they are not known is said; one table for both runs holds the same users."""
    now = prepared(few_shot={"u1": "a", "u2": "b", "u3": "c", "u4": "d"}, anchor={"a1": "x"})
    anchors = {"a1": "11", "a2": "22", "a3": "33"}
    found = since(run(cell(now, THEN, anchors)))
    assert found is not None
    assert found.changes == ["LaMP-2M, few-shot users: 1 added (u4)"]
    where.remove(where.path(before.users.few_shot).parent)
    found = since(run(cell(now, THEN, anchors)))
    assert found is not None
    assert found.changes == ["LaMP-2M: the last run's users are not known"]


def test_many_ids_are_cut(before: Cell) -> None:
    few = {f"u{number:02}": "text" for number in range(15)}
    found = since(run(cell(prepared(few_shot=few), THEN, {})))
    assert found is not None
    shown = found.lines()[1]
    assert "15 added (u00, u01, u02, u03, u04, u05, u06, u07, u08, u09 and 5 more)" in shown


def test_on_the_page() -> None:
    change = ScoreChange(
        cell="LaMP-2M", method="mta",
        then=estimate(0.5, 0.25, 0.75), now=estimate(0.625),
    )  # fmt: skip
    line = f"LaMP-2M, few-shot users: 1 added ({HOSTILE})"
    page = report_html(report_case(since=Since(HOSTILE, [change], [line])))
    assert "Since the last run of this configuration" in page
    assert "few-shot users: 1 added" in page
    assert "<td>+0.125</td>" in page
    assert '0.500<span class="small">[0.250, 0.750]</span>' in page
    assert HOSTILE not in page
    assert "Since the last run" not in report_html(report_case())

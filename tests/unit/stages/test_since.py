"""What changed since the last run of the same configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.report.files import write_run
from tasks.report.html import report_html
from tasks.report.since import last_run, since, since_lines
from tasks.store.artifacts import Store
from tasks.store.pieces import digest
from tests.unit.stages.report_case import HOSTILE, estimate, report_case

CONFIG = {"data": "users", "seed": 0, "compute": {"device": "cpu"}}
ABOUT = {"name": "brave-cat", "date": "2026-11-15 23:00"}


def prepared(where: Store, **roles: dict[str, str]) -> dict[str, Any]:
    """A `prepare` result: per role the users, each with one item of the given text."""

    def make(out: Path) -> dict[str, Any]:
        for role in ("base", "anchor", "few_shot"):
            rows = [
                {
                    "user_id": user,
                    "profile": [{"text": text, "answer": "x"}],
                    "query": [{"id": "q", "input": "?", "gold": "x"}],
                }
                for user, text in roles.get(role, {}).items()
            ]
            kinds = {
                "user_id": pl.String,
                "profile": pl.List(pl.Struct({"text": pl.String, "answer": pl.String})),
                "query": pl.List(
                    pl.Struct({"id": pl.String, "input": pl.String, "gold": pl.String})
                ),
            }
            pl.DataFrame(rows, schema=kinds).write_parquet(out / f"{role}.parquet")
        return {}

    return {"ref": where.get("prepare", digest(roles), make).ref}


def summary(
    users: dict[str, Any], scores: dict[str, Any], anchors: dict[str, str], seed: int = 0
) -> dict[str, Any]:
    trained = {name: {"ref": {"sha256": sha}} for name, sha in anchors.items()}
    return {
        "lamp_task": "LaMP-2M",
        "seed": seed,
        "prepared": users,
        "base": {},
        "banks": {"mta": {"meta_loras": trained}},
        "bank_of": {"mta": "mta"},
        "stacking": {},
        "compared": {
            "value": {"intervals": {name: {"score": one} for name, one in scores.items()}}
        },
    }


THEN = {"base": estimate(0.5, 0.25, 0.75), "mta": estimate(0.5, 0.25, 0.75), "bayes": estimate(1.0)}
NOW = {"base": estimate(0.5, 0.25, 0.75), "mta": estimate(0.625, 0.5, 0.75), "bayes": estimate(1.0)}


@pytest.fixture
def before(where: Store) -> dict[str, Any]:
    users = prepared(where, few_shot={"u1": "a", "u2": "b", "u3": "c"}, anchor={"a1": "x"})
    one = summary(users, THEN, {"a1": "11", "a2": "22", "a3": "33"})
    assert since(where, CONFIG, [one]) is None
    write_run("first", CONFIG, [one], ABOUT)
    return one


def test_scores_users_and_anchors(where: Store, before: dict[str, Any]) -> None:
    users = prepared(where, few_shot={"u1": "a", "u2": "other", "u4": "d"}, anchor={"a1": "x"})
    found = since(where, CONFIG, [summary(users, NOW, {"a1": "11", "a3": "34", "a4": "44"})])
    assert found is not None
    cell = {"lamp_task": "LaMP-2M", "seed": 0}
    assert found == {
        "run": ABOUT,
        "unknown": [],
        "scores": [
            {**cell, "method": "base", "then": THEN["base"], "now": THEN["base"]},
            {**cell, "method": "mta", "then": THEN["mta"], "now": NOW["mta"]},
        ],
        "users": [
            {**cell, "role": "few_shot", "added": ["u4"], "removed": ["u3"], "changed": ["u2"]}
        ],
        "anchors": [
            {**cell, "method": "mta", "added": ["a4"], "removed": ["a2"], "changed": ["a3"]}
        ],
    }
    head = "since the run brave-cat of 2026-11-15 23:00: LaMP-2M, "
    assert since_lines(found) == [
        f"{head}few-shot users: 1 added (u4); 1 removed (u3); 1 changed (u2)",
        f"{head}mta, anchors: 1 new (a4); 1 replaced (a2); 1 trained again (a3)",
        f"{head}mta: score 0.500 [0.250, 0.750] -> 0.625 [0.500, 0.750]",
    ]


def test_nothing_changed(where: Store, before: dict[str, Any]) -> None:
    found = since(where, CONFIG, [before])
    head = "since the run brave-cat of 2026-11-15 23:00: "
    assert since_lines(found) == [
        f"{head}users and anchors are the same",
        f"{head}no score moved",
    ]


def test_the_same_configuration(where: Store, before: dict[str, Any]) -> None:
    """Where it runs decides nothing; all else does. Of several the one that ended last."""
    assert last_run(where, CONFIG | {"compute": {"device": "cuda"}}) is not None
    assert last_run(where, CONFIG | {"seed": 1}) is None
    assert last_run(where, CONFIG | {"more": 1}) is None
    second = write_run("a-second", CONFIG, [before], ABOUT | {"name": "calm-dog"})
    write_run("a-third", CONFIG | {"seed": 3}, [before], ABOUT | {"name": "other"})
    folder = second.parent
    (folder / "broken.json").write_text("{")
    (folder / "old.json").write_text(json.dumps({"config": CONFIG, "seeds": {}}))
    for number, name in enumerate(("first", "a-second", "a-third", "broken", "old")):
        os.utime(folder / f"{name}.json", (1000 + number, 1000 + number))
    found = last_run(where, CONFIG)
    assert found is not None
    assert found["about"]["name"] == "calm-dog"


def test_users_are_known_when_their_texts_are_gone(where: Store, before: dict[str, Any]) -> None:
    """By the hashes that the first run left; without these it is said that they are not known."""
    key = before["prepared"]["ref"]["uri"].partition("/")[2]
    now = prepared(where, few_shot={"u1": "a", "u2": "b", "u3": "c", "u4": "d"}, anchor={"a1": "x"})
    where.remove("prepare", key)
    one = summary(now, THEN, {"a1": "11", "a2": "22", "a3": "33"})
    found = since(where, CONFIG, [one])
    assert found is not None
    assert [each["added"] for each in found["users"]] == [["u4"]]
    for record in (where.root / "fingerprints").glob("*/*"):
        where.remove("fingerprints", record.name)
    found = since(where, CONFIG, [one])
    assert found is not None
    assert found["unknown"] == ["LaMP-2M"]
    assert "LaMP-2M: the last run's users are not known" in since_lines(found)[0]


def test_what_goes_wrong_costs_no_run(where: Store, capsys: pytest.CaptureFixture[str]) -> None:
    users = prepared(where, few_shot={"u1": "a"})
    assert since(where, CONFIG, [{"prepared": users} | {"lamp_task": "LaMP-2M"}]) is None
    write_run("first", CONFIG, [summary(users, THEN, {})], ABOUT)
    assert since(where, CONFIG, [{"prepared": users} | {"lamp_task": "LaMP-2M"}]) is None
    assert "what changed since the last run is not known (KeyError" in capsys.readouterr().out


def test_many_ids_are_cut(where: Store, before: dict[str, Any]) -> None:
    few = {f"u{number:02}": "text" for number in range(15)}
    found = since(where, CONFIG, [summary(prepared(where, few_shot=few), THEN, {})])
    shown = since_lines(found)[1]
    assert "15 added (u00, u01, u02, u03, u04, u05, u06, u07, u08, u09 and 5 more)" in shown


def test_on_the_page() -> None:
    cell = {"lamp_task": "LaMP-2M", "seed": 0, "method": "mta"}
    found = {
        "run": {"name": HOSTILE, "date": "2026-11-15 23:00"},
        "scores": [{**cell, "then": estimate(0.5, 0.25, 0.75), "now": estimate(0.625)}],
        "users": [{**cell, "role": "few_shot", "added": [HOSTILE], "removed": [], "changed": []}],
        "anchors": [],
        "unknown": [],
    }
    page = report_html(report_case(since=found))
    assert "Since the last run of this configuration" in page
    assert "few-shot users: 1 added" in page
    assert "<td>+0.125</td>" in page
    assert '0.500<span class="small">[0.250, 0.750]</span>' in page
    assert HOSTILE not in page
    assert "Since the last run" not in report_html(report_case())

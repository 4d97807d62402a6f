"""The table of the comparison, costs per user, and small files beside the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.report.differences import difference_lines
from tasks.report.files import write_run, write_state
from tasks.report.table import (
    costs,
    notes,
    rows,
    share_lines,
    table_text,
)
from tasks.report.words import seed_lines
from tasks.store.artifacts import Store
from tasks.store.pieces import digest
from tasks.tracking.values import manifest
from tests.unit.stages.test_answers import scored


def test_table_by_hand() -> None:
    """Counts as whole numbers, other decimals with four places, a dash where there is none.

    An interval stands in its metric's column; one without bounds is not shown.
    """
    first = {"lamp_task": "LaMP-2M", "method": "base", "users": 60, "accuracy": 0.5}
    first |= {"accuracy_lo": 0.4, "accuracy_hi": 0.61}
    second = first | {"method": "merge_only", "accuracy": 0.61234}
    third = {"lamp_task": "LaMP-3", "method": "mta", "users": 7, "mae": 1 / 3}
    table = [
        first | {"tokens_per_user": 0.0, "seconds_per_user": 123.45678},
        second | {"tokens_per_user": 12345.6, "seconds_per_user": 0.1},
        third | {"mae_lo": None, "mae_hi": None},
    ]
    assert table_text(table, ["few users"], ["anchor x: failed"]).splitlines() == [
        "lamp_task  method      users               accuracy  tokens_per_user  seconds_per_user",
        "---------  ----------  -----  ---------------------  ---------------  ----------------",
        "LaMP-2M    base           60  0.5000 [0.400, 0.610]                0          123.4568",
        "LaMP-2M    merge_only     60  0.6123 [0.400, 0.610]           12,346            0.1000",
        "",
        "lamp_task  method  users     mae",
        "---------  ------  -----  ------",
        "LaMP-3     mta         7  0.3333",
        "",
        "note: few users",
        "MISSING: anchor x: failed",
    ]
    assert table_text(table, [], []).endswith("0.3333\n")
    assert "MISSING" not in table_text(table, [], [])


def test_claims_by_hand() -> None:
    """Only of methods that were run; with their interval, where there is one."""

    def score(point: float, lo: float | None, hi: float | None, holds: bool | None) -> Any:
        return {"score": {"point": point, "lo": lo, "hi": hi, "holds": holds}}

    found = {
        "mta": {
            "merge_only": score(0.05, 0.01, 0.0912345, True),
            "base": score(0.2, None, None, None),
        },
        "merge_only": {"base": score(0.01, -0.02, 0.04, False)},
    }
    mean = {"value": {"differences": found, "queries": 1234}}
    assert difference_lines(mean, []) == [
        "mean score, mta - merge_only: +0.0500 [+0.0100, +0.0912] holds",
        "mean score, merge_only - base: +0.0100 [-0.0200, +0.0400] not shown",
        "mean score, mta - base: +0.2000 has no interval",
    ]
    # Told to be alike; and right as often, with other answers.
    found["merge_only"]["base"] = found["mta"]["oppu"] = score(0.0, 0.0, 0.0, False)
    assert difference_lines(mean, [["base", "merge_only"], ["mta", "rag"]])[1:3] == [
        "mean score, merge_only - base: identical answers to all 1,234 queries",
        "mean score, mta - oppu: the same score for every group of users",
    ]


def test_a_share_below_0_is_explained_once() -> None:
    shares = [{"share_of_attainable": share} for share in (0.0, None, 1.0)]
    assert share_lines([*shares, {}]) == []
    assert share_lines(
        [*shares, {"share_of_attainable": -0.09}, {"share_of_attainable": -2.4}]
    ) == [
        "A share of the attainable below 0 is worse than the best answers that ignore who asks "
        "(nonpersonal); far below 0, the model has not learned the task"
    ]


def test_seeds_by_hand() -> None:
    """Two LaMP tasks, two seeds: .5 and .7 for mta, .4 and .4 for base; a seed that lacks one."""

    def cell(seed: int, task: str, mta: float, base: float) -> dict[str, Any]:
        intervals = {
            "mta": {"score": {"point": mta}, "share_of_attainable": {"point": mta / 2}},
            "base": {"score": {"point": base}},
        }
        compared = {"value": {"intervals": intervals}}
        return {"seed": seed, "lamp_task": task, "compared": compared}

    found = [
        cell(0, "LaMP-1", 0.4, 0.3),
        cell(0, "LaMP-3", 0.6, 0.5),
        cell(1, "LaMP-1", 0.8, 0.4),
        cell(1, "LaMP-3", 0.6, 0.4),
        cell(2, "LaMP-3", 0.9, 0.9),
    ]
    said = "by seed (0, 1), which no interval contains: "
    assert seed_lines(found) == [
        f"{said}mean score, mta - base: +0.1000, +0.3000",
        f"{said}share of the attainable, mta: 0.250, 0.350",
    ]
    assert seed_lines(found[:2]) == []


def test_notes_by_hand(where: Store) -> None:
    """What was dropped, fewer anchors than asked, several users by one author, seen queries."""
    counts = {
        "few_shot_groups": 3,
        "few_shot_users": 3,
        "queries_in_other_profiles": 0,
        "queries": 9,
    }
    summary: dict[str, Any] = {
        "lamp_task": "LaMP-2M",
        "prepared": {"value": {"dropped": {}, "counts": counts}},
        "seed": 0,
        "several_seeds": False,
        "base": {},
        "scores": {"mta": scored(where, ["comedy"])},
        "banks": {
            "mta": {
                "kind": {"anchors": {"train_on": "user"}},
                "anchors": {"value": {"anchors": [1, 2], "whole_clusters": 0, "asked": 2}},
            }
        },
    }
    assert notes(summary, where) == []
    summary["prepared"]["value"] = {
        "dropped": {"bad item": 4},
        "counts": counts
        | {
            "few_shot_groups": 2,
            "queries_in_other_profiles": 5,
            "shared_author": 6,
            "papers_asked_by_their_author": 8,
            "papers_asked_by_a_drawn_citation": 7,
        },
    }
    summary["scores"]["mta"] = scored(where, ["It is a comedy"], "mta_published")
    own = summary["banks"]["mta"]
    own["anchors"]["value"]["asked"] = 7
    assert notes(summary, where) == [
        "LaMP-2M: dropped 4 x bad item",
        "LaMP-2M, mta: 2 users as anchors of 7 asked",
        "LaMP-2M: answers that are no label, so wrong: mta 100%; scoring.answer=likelihood chooses "
        "among the labels, base.task_adapt.enabled=true teaches them",
        "LaMP-2M: metrics by the rules of MTA's published scorer, not by LaMP's",
        "LaMP-2M: 6 base users or anchor candidates are of one author with a user of another side "
        "(split.kind published divides users, not authors)",
        "LaMP-2M: no paper names a citation; 8 papers were asked against another author's paper "
        "instead",
        "LaMP-2M: 7 papers name several citations; the seed drew one of each",
        "LaMP-2M: the 3 few-shot users are 2 authors",
        "LaMP-2M: the texts of 5 of 9 queries stand in the profile of a base user or anchor "
        "candidate too",
    ]


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (
            "lamp",
            "LaMP-4: 2 golds have no letter a to z and no digit, so every answer to them has ROUGE "
            "0 (scoring.tokens unicode has words of any script)",
        ),
        (
            "unicode",
            "LaMP-4: 2 golds have no letter and no digit, so every answer to them has ROUGE 0",
        ),
    ],
)
def test_golds_that_no_answer_meets_are_noted(where: Store, rules: str, said: str) -> None:
    counts = {"few_shot_groups": 1, "few_shot_users": 1, "queries_in_other_profiles": 0}
    summary: dict[str, Any] = {
        "lamp_task": "LaMP-4",
        "prepared": {"value": {"dropped": {}, "counts": counts}},
        "seed": 0,
        "several_seeds": False,
        "base": {},
        "scores": {"base": scored(where, ["a title"], rules, tokenless=2)},
        "banks": {},
    }
    rule = "LaMP-4: ROUGE of words of any script (scoring.tokens), not by LaMP's rule"
    assert notes(summary, where) == [*([rule] if rules == "unicode" else []), said]


@pytest.fixture
def summary(where: Store) -> dict[str, Any]:
    """Two users with recipes of two anchors (names of 2 and 3 letters, 3 and 4 bytes)."""

    def recipes(out: Path) -> dict[str, Any]:
        pl.DataFrame(
            {
                "user_id": ["u", "v"],
                "anchors": [["aa", "bbb"], ["bbb", "éé"]],
                "similarities": [[0.5, 0.1], [0.5, 0.1]],
                "weights": [[0.8, 0.2], [0.8, 0.2]],
            }
        ).write_parquet(out / "recipes.parquet")
        return {}

    fused = where.get("fusion", digest(1), recipes)
    answered = [{"notes": {"per_user": [1.0]}}, {"notes": {"per_user": [2.0]}}]
    shard = {
        "value": {
            "bytes_per_user": 1000,
            "work": [{"steps": 2, "tokens": 300}, {"steps": 3, "tokens": 101}],
        },
        "notes": {"per_user": [0.5, 0.7]},
    }
    score = scored(where, ["comedy", "no", "no", "comedy"])
    score["value"] |= {"users": 2, "queries": 9, "metrics": {"accuracy": 0.5}}
    found = {
        "accuracy": {"point": 0.5, "lo": 0.25, "hi": None},
        "score": {"point": 0.5, "lo": 0.25, "hi": None},
    }
    compared = {"groups": 2, "queries": 9, "intervals": {}}
    methods = ("base", "merge_only", "mta")
    return {
        "lamp_task": "LaMP-2M",
        "seed": 0,
        "several_seeds": False,
        "answered": dict.fromkeys(methods, answered),
        "scores": dict.fromkeys(methods, score),
        "compared": {"value": compared | {"intervals": dict.fromkeys([*methods, "bayes"], found)}},
        "banks": {"merge_only": {"fusion": {"ref": fused.ref}, "evidence": None}},
        "bank_of": {"merge_only": "merge_only", "mta": "merge_only"},
        "stacking": {"mta": [shard]},
    }


def test_costs_by_hand(where: Store, summary: dict[str, Any]) -> None:
    """Recipe: 5 and 7 bytes of ids, 16 of weights, so 22 on average; seconds 1.5 (+ 0.6)."""
    nothing = {"steps_per_user": 0.0, "tokens_per_user": 0.0, "seconds_per_user": 1.5}
    assert costs(summary, "base", where) == {"bytes_per_user": 0.0, **nothing}
    assert costs(summary, "merge_only", where) == {"bytes_per_user": 22.0, **nothing}
    assert costs(summary, "mta", where) == {
        "bytes_per_user": 1022.0,
        "steps_per_user": 2.5,
        "tokens_per_user": 200.5,
        "seconds_per_user": 2.1,
    }


def test_one_row_per_task_and_method(where: Store, summary: dict[str, Any]) -> None:
    table = rows([summary, summary | {"lamp_task": "LaMP-3"}], where)
    methods = ("base", "merge_only", "mta", "bayes")
    assert [(row["lamp_task"], row["method"]) for row in table] == [
        (task, method) for task in ("LaMP-2M", "LaMP-3") for method in methods
    ]
    known = {"accuracy": 0.5, "accuracy_lo": 0.25, "accuracy_hi": None}
    known |= {"users": 2, "groups": 2, "queries": 9}
    assert table[2] == {
        "lamp_task": "LaMP-2M",
        "method": "mta",
        **known,
        "no_label": 0.5,
        **costs(summary, "mta", where),
    }
    # Beside the score, before what it cost.
    assert list(table[2])[:6] == [
        "lamp_task", "method", "accuracy", "accuracy_lo", "accuracy_hi", "no_label"
    ]  # fmt: skip
    # Headlines have no labels.
    assert all("no_label" not in row for row in rows([summary | {"lamp_task": "LaMP-4"}], where))
    # The optimum is nobody's work: it has no costs.
    assert table[3] == {"lamp_task": "LaMP-2M", "method": "bayes", **known}
    (with_seed, *_) = rows([summary | {"seed": 7, "several_seeds": True}], where)
    assert with_seed["seed"] == 7


def test_small_files_beside_the_store(where: Store) -> None:
    for text in ("first", "second"):
        path = write_state("runs/x.txt", text)
        assert path == where.root.parent / "runs" / "x.txt"
        assert path.read_text() == text
    assert [file.name for file in path.parent.iterdir()] == ["x.txt"]


def test_a_run_is_written_down(where: Store) -> None:
    names = ("prepared", "base", "banks", "bank_of", "stacking")
    stages = {name: {"ref": name} for name in names}
    done = {"lamp_task": "LaMP-2M", "seed": 3, "scores": 1, **stages}
    scored = {"compared": {"value": {"intervals": {"mta": 1}, "differences": 2}}}
    other = done | {"lamp_task": "LaMP-3", **scored}
    path = write_run("run-1", {"seed": 0}, [done, other], {"name": "me", "date": "today"})
    assert path == where.root.parent / "runs" / "run-1.json"
    kept = {"compared": {"value": {"intervals": {"mta": 1}}}}
    assert json.loads(path.read_text()) == {
        "config": {"seed": 0},
        "about": {"name": "me", "date": "today"},
        "seeds": {"3": {"LaMP-2M": stages, "LaMP-3": stages | kept}},
    }


def test_manifest_says_where_each_result_came_from() -> None:
    def result(name: str, cached: bool = False) -> dict[str, Any]:
        ref = {"uri": f"{name}/k", "sha256": "s", "kind": name}
        return {"ref": ref, "cached": cached, "notes": {"seconds": 1.5}, "value": {"big": 1}}

    single = ("embedded", "anchors", "bank", "fusion", "map")
    own: dict[str, Any] = {name: result(name) for name in single}
    own |= {"evidence": None, "meta_loras": {"a": result("meta_lora", cached=True)}}
    summary: dict[str, Any] = {
        "lamp_task": "LaMP-2M",
        "prepared": result("prepared"),
        "base": result("base"),
        "compared": result("compare"),
        "missing": ["x"],
        "banks": {"mta": own},
        "bank_of": {"mta": "mta"},
        "stacking": {"mta": [result("stacking")]},
        "answered": {"mta": [result("predictions")]},
        "scores": {"mta": result("score")},
    }
    got = manifest(summary)
    assert got["missing"] == ["x"]
    parts = {"prepared", "base", "compared", "banks", "bank_of", "stacking", "answered", "scores"}
    assert got["stages"].keys() == parts
    bank = got["stages"]["banks"]["mta"]
    assert bank.keys() == {*single, "meta_loras"}
    assert bank["meta_loras"]["a"] == {
        "uri": "meta_lora/k",
        "sha256": "s",
        "kind": "meta_lora",
        "cached": True,
        "seconds": 1.5,
    }
    assert "big" not in json.dumps(got)

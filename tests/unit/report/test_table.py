"""The table of the comparison, and what its reader must know."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.report.notes import cell_notes, difference_lines, share_lines
from tasks.report.table import costs, rows, table_text
from tasks.results.models import Compared, Difference
from tasks.results.store import Store
from tests.unit.report.cells import (
    COUNTS,
    NOWHERE,
    anchor,
    batch,
    cell,
    compared,
    estimate,
    merging,
    users,
)


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
        return {"score": Difference(point=point, lo=lo, hi=hi, holds=holds)}

    def mean() -> Compared:
        return compared().model_copy(update={"differences": found, "queries": 1234})

    found = {
        "mta": {
            "merge_only": score(0.05, 0.01, 0.0912345, True),
            "base": score(0.2, None, None, None),
        },
        "merge_only": {"base": score(0.01, -0.02, 0.04, False)},
    }
    assert difference_lines(mean(), []) == [
        "mean score, mta - merge_only: +0.0500 [+0.0100, +0.0912] holds",
        "mean score, merge_only - base: +0.0100 [-0.0200, +0.0400] not shown",
        "mean score, mta - base: +0.2000 has no interval",
    ]
    # Told to be alike; and right as often, with other answers.
    found["merge_only"]["base"] = found["mta"]["oppu"] = score(0.0, 0.0, 0.0, False)
    assert difference_lines(mean(), [["base", "merge_only"], ["mta", "rag"]])[1:3] == [
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


def test_notes_by_hand(where: Store) -> None:
    """What was dropped, fewer anchors than asked, several users by one author, seen queries."""
    two = [anchor("a"), anchor("b")]
    fine = cell(compared(mta=NOWHERE), mergings=(merging(("mta",), two, asked=2),))
    assert cell_notes(fine) == []
    counts = COUNTS | {
        "few_shot_groups": 2,
        "queries_in_other_profiles": 5,
        "shared_author": 6,
        "papers_asked_by_their_author": 8,
        "papers_asked_by_a_drawn_citation": 7,
    }
    noted = cell(
        compared("LaMP-2M", "mta_published", no_label={"mta": 1.0}, mta=NOWHERE),
        users=users(dropped={"bad item": 4}, counts=counts),
        mergings=(merging(("mta",), two, asked=7),),
    )
    assert cell_notes(noted) == [
        "LaMP-2M: dropped 4 x bad item",
        "LaMP-2M, mta: 2 users as anchors of 7 asked",
        "LaMP-2M: answers that are no label, so wrong: mta 100%; scoring.answer=likelihood chooses "
        "among the labels, base.task_adapt.enabled=true teaches them",
        "LaMP-2M: metrics by the rules of MTA's published scorer, not by LaMP's",
        "LaMP-2M: 6 base users or anchor candidates share an author with a user on another side "
        "(split.kind=published divides users, not authors)",
        "LaMP-2M: no paper names a citation; 8 papers were asked against another author's paper "
        "instead",
        "LaMP-2M: 7 papers name several citations; the seed drew one of each",
        "LaMP-2M: the 3 few-shot users come from 2 authors",
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
    one = cell(compared("LaMP-4", rules, tokenless=2, base=NOWHERE))
    rule = "LaMP-4: ROUGE of words of any script (scoring.tokens), not by LaMP's rule"
    assert cell_notes(one) == [*([rule] if rules == "unicode" else []), said]


METHODS = ("base", "merge_only", "mta")


def scored(lamp_task: str = "LaMP-2M") -> Compared:
    shares = {} if lamp_task == "LaMP-4" else dict.fromkeys(METHODS, 0.5)
    known = {"accuracy": estimate(0.5, 0.25, None), "score": estimate(0.5, 0.25, None)}
    intervals = dict.fromkeys([*METHODS, "bayes"], known)
    found = compared(lamp_task, no_label=shares, **dict.fromkeys(METHODS, NOWHERE))
    return found.model_copy(update={"intervals": intervals})


@pytest.fixture
def parts(where: Store) -> dict[str, Any]:
    """Two users with recipes of two anchors (names of 2 and 3 letters, 3 and 4 bytes)."""
    recipes = {
        user: {"anchors": anchors, "similarities": [0.5, 0.1], "weights": [0.8, 0.2]}
        for user, anchors in {"u": ["aa", "bbb"], "v": ["bbb", "éé"]}.items()
    }
    # Answers take 1 and 2 s, training 0.5 and 0.7.
    plain = (batch(0, [(0, 0, 1.0)]), batch(0, [(0, 0, 2.0)]))
    trained = (batch(1000, [(2, 300, 1.5)]), batch(1000, [(3, 101, 2.7)]))
    return {
        "mergings": (merging(("merge_only", "mta"), recipes=recipes),),
        "answers": {"base": plain, "merge_only": plain, "mta": trained},
    }


def test_costs_by_hand(parts: dict[str, Any]) -> None:
    """Recipe: 5 and 7 bytes of ids, 16 of weights, so 22 on average; seconds 1.5 (+ 0.6)."""
    one = cell(scored(), **parts)
    nothing = {"steps_per_user": 0.0, "tokens_per_user": 0.0, "seconds_per_user": 1.5}
    nothing |= {"passes_per_answer": 1.0}
    assert costs(one, "base") == {"bytes_per_user": 0.0, **nothing}
    assert costs(one, "merge_only") == {"bytes_per_user": 22.0, **nothing}
    assert costs(one, "mta") == {
        "bytes_per_user": 1022.0,
        "steps_per_user": 2.5,
        "tokens_per_user": 200.5,
        "seconds_per_user": 2.1,
        "passes_per_answer": 1.0,
    }


def test_one_row_per_task_and_method(parts: dict[str, Any]) -> None:
    one = cell(scored(), **parts)
    table = rows([one, cell(scored("LaMP-3"), **parts)])
    assert [(row["lamp_task"], row["method"]) for row in table] == [
        (task, method) for task in ("LaMP-2M", "LaMP-3") for method in (*METHODS, "bayes")
    ]
    known = {"accuracy": 0.5, "accuracy_lo": 0.25, "accuracy_hi": None}
    known |= {"users": 2, "groups": 2, "queries": 9}
    assert table[2] == {
        "lamp_task": "LaMP-2M",
        "method": "mta",
        **known,
        "no_label": 0.5,
        **costs(one, "mta"),
    }
    # Beside the score, before what it cost.
    assert list(table[2])[:6] == [
        "lamp_task", "method", "accuracy", "accuracy_lo", "accuracy_hi", "no_label"
    ]  # fmt: skip
    # Headlines have no labels.
    assert all("no_label" not in row for row in rows([cell(scored("LaMP-4"), **parts)]))
    # The optimum is nobody's work: it has no costs.
    assert table[3] == {"lamp_task": "LaMP-2M", "method": "bayes", **known}
    (with_seed, *_) = rows([cell(scored(), 7, {"seeds": [7, 8]}, **parts)])
    assert with_seed["seed"] == 7

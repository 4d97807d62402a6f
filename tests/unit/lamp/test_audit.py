"""The audit, by hand on six users and on the published file."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from tasks.lamp.audit import audit
from tasks.lamp.definitions import get_task
from tasks.lamp.formats import read_users
from tasks.lamp.groups import find_groups
from tasks.lamp.tables import NO_USERS
from tests.unit.lamp.helpers import (
    REAL_FILE,
    frame,
    movie,
    needs_real_file,
    question,
    split_of,
    user,
    write,
)

TASK = get_task("LaMP-2M")


@pytest.fixture
def six(tmp_path: Path) -> Path:
    """u and v are one author; w (few-shot), b (base) and a (anchor) are another; c is a third."""
    users = {
        "user_base_LLM.json": [user("b", movie("w1"), movie("w2"), movie(" "))],
        "user_anchor_candidate.json": [
            user("a", movie("w1"), movie("w2"), movie("w3"), movie("u9", "action")),
            user("c", *(movie(f"c{n}", "classic") for n in range(6)), movie("c0", "classic")),
        ],
        "user_few_shot.json": [
            user("u", movie("u1"), movie("u2"), query=[question("q1", "u  9")]),
            user("v", movie("u1"), movie("u2"), movie("u 9"), query=[question("q2", "u1")]),
            user(
                "w", movie("w1"), movie("w2"), query=[question("q3", "u9"), question("q4", "new")]
            ),
            user("empty", movie(""), query=[question("q5", "x")]),
        ],
    }
    for name, records in users.items():
        write(tmp_path / name, records)
    return tmp_path


def test_by_hand(six: Path) -> None:
    loaded = read_users(six, TASK)
    table = loaded.users.with_columns(find_groups(loaded.users, 0.5, TASK))
    found = audit(table, loaded.dropped, TASK)
    # Items: b 2, a 4 (one action), c 6 classic, u 2, v 3, w 2; comedy is the rest, 12 of 19.
    shares = {"comedy": 12 / 19, "classic": 6 / 19, "action": 1 / 19}
    entropy = 0.6315789 * 0.6629650 + 0.3157895 * 1.6629650 + 0.0526316 * 4.2479275
    assert found.pop("labels") == {
        "items": {
            "shares": {
                label: pytest.approx(shares.get(label, 0.0), abs=1e-6) for label in TASK.labels
            },
            "majority": "comedy",
            "majority_share": pytest.approx(12 / 19, abs=1e-6),
            "entropy_bits": pytest.approx(entropy, abs=1e-5),
        },
        "golds": {
            "shares": {label: float(label == "comedy") for label in TASK.labels},
            "majority": "comedy",
            "majority_share": 1.0,
            "entropy_bits": 0.0,
        },
    }
    # q1 stands in v's profile (white space does not count), q2 in u's and in v's own; q3 in a's,
    # who is w's sibling, but with another answer there; q4 nowhere.
    asked = {
        "asked": 4,
        "text": {"any": 3, "own": 1, "sibling": 3, "other": 0},
        "text_and_answer": {"any": 2, "own": 1, "sibling": 2, "other": 0},
    }
    assert found == {
        "groups": {"all": {"1": 1, "2": 1, "3": 1}, "few_shot": {"1": 1, "2": 1}},
        "queries": {"all": asked, "few_shot": asked},
        "shared_groups": {"anchor": 1, "base": 1},
        "duplicates": {
            "dropped": 1,
            # w1, w2, w3, u9, six of c's, u1, u2 and "u 9"; w1, w2, u1 and u2 stand in several.
            "texts": 13,
            "repeated_texts": 4,
            "texts_with_several_answers": 0,
        },
        "empty": {
            "profile item with empty text or answer": 2,
            "query of a user with no profile items left": 1,
            "user with no profile items left": 1,
        },
        "profile_lengths": {
            "base": {"min": 2, "median": 2.0, "max": 2},
            "anchor": {"min": 4, "median": 5.0, "max": 6},
            "few_shot": {"min": 2, "median": 2.0, "max": 3},
        },
    }
    assert json.loads(json.dumps(found)) == found


def test_one_text_with_several_answers() -> None:
    users = frame({"a": ["x", "y"], "b": ["x"]}, roles={"a": "anchor", "b": "anchor"}).to_dicts()
    users[1]["profile"][0]["answer"] = "action"
    rows = [row | {"group": row["user_id"]} for row in users]
    table = pl.DataFrame(rows, schema={**NO_USERS.schema, "group": pl.String()})
    found = audit(table, {}, TASK)
    assert found["duplicates"] == {
        "dropped": 0,
        "texts": 2,
        "repeated_texts": 1,
        "texts_with_several_answers": 1,
    }
    # Nothing is asked, and two sides are empty.
    assert found["labels"]["golds"] is None
    assert found["profile_lengths"]["few_shot"] is None
    # Free text has no labels to count.
    assert audit(table, {}, get_task("LaMP-5"))["labels"] == {"items": None, "golds": None}


@needs_real_file
def test_the_published_file_says_it_by_itself() -> None:
    """shared/data/lamp/README.md has these facts, measured on the file by its collector."""
    loaded = read_users(REAL_FILE, TASK)
    split = split_of(
        loaded.users, TASK, seed=0, base_share=1 / 3, anchor_share=1 / 3, same_author_share=0.5
    )
    found = audit(split.users, loaded.dropped, TASK)
    assert found["groups"] == {"all": {"3": 24}, "few_shot": {"3": 8}}
    assert found["queries"]["all"] == {
        "asked": 72,
        "text": {"any": 72, "own": 0, "sibling": 72, "other": 24},
        "text_and_answer": {"any": 72, "own": 0, "sibling": 72, "other": 20},
    }
    assert found["queries"]["few_shot"]["text"]["sibling"] == 24
    assert found["shared_groups"] == {"anchor": 0, "base": 0}
    assert found["duplicates"] == {
        "dropped": 0,
        "texts": 212,
        "repeated_texts": 212,
        "texts_with_several_answers": 17,
    }
    assert found["empty"] == {}
    assert found["profile_lengths"]["few_shot"] == {"min": 10, "median": 10.0, "max": 10}

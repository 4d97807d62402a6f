"""Reading users: what is kept, what is counted, and the one line said about bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import InputError
from tasks.lamp.definitions import get_task
from tasks.lamp.formats import read_users
from tasks.lamp.kept import (
    DUPLICATE_ITEM,
    EMPTY_ITEM,
    EMPTY_QUERY,
    EMPTY_USER,
    ORPHAN_QUERY,
    UNKNOWN_GOLD,
    UNKNOWN_LABEL,
)
from tests.unit.lamp.helpers import REAL_FILE, movie, needs_real_file, question, user, write

MOVIES = get_task("LaMP-2M")
RATINGS = get_task("LaMP-3")
TITLES = get_task("LaMP-5")


def error_line(path: Path, *parts: str, task: Any = MOVIES) -> None:
    with pytest.raises(InputError) as caught:
        read_users(path, task)
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line


def test_user_file(tmp_path: Path) -> None:
    content = [
        user(7, movie("one", "sci-fi"), movie("two"), query=[question("q1", "three", "romance")]),
        {"user_id": "../../x", "profile": [movie("four")]},
    ]
    loaded = read_users(write(tmp_path / "users.json", content), MOVIES)
    assert loaded.users.to_dicts() == [
        {
            "user_id": "7",
            "role": None,
            "profile": [
                {"id": "id of one", "text": "one", "answer": "sci-fi"},
                {"id": "id of two", "text": "two", "answer": "comedy"},
            ],
            "query": [
                {"id": "q1", "input": "Which tag? description: three", "gold": "romance"},
            ],
        },
        {
            "user_id": "../../x",
            "role": None,
            "profile": [{"id": "id of four", "text": "four", "answer": "comedy"}],
            "query": [],
        },
    ]
    assert loaded.dropped == {}


@pytest.mark.parametrize("few_shot", ["user_few_shot.json", "user_test_100.json", "test_100.json"])
def test_role_folder(tmp_path: Path, few_shot: str) -> None:
    write(tmp_path / "user_base_LLM.json", [user("b", movie("one"))])
    write(tmp_path / "user_anchor_candidate.json", [user("a", movie("two"))])
    write(tmp_path / few_shot, [user("f", movie("three"), query=[question("q", "four")])])
    loaded = read_users(tmp_path, MOVIES)
    assert loaded.users.select("user_id", "role").rows() == [
        ("b", "base"),
        ("a", "anchor"),
        ("f", "few_shot"),
    ]


def official(folder: Path, split: str, ids: list[str], gold_ids: list[str]) -> None:
    profile = [{"id": "1", "title": "t", "abstract": "a"}]
    questions = [{"id": i, "input": f"of a paper: {i}", "profile": profile} for i in ids]
    golds = [{"id": i, "output": f"title of {i}"} for i in gold_ids]
    write(folder / f"{split}_questions.json", questions)
    write(folder / f"{split}_outputs.json", {"task": "LaMP_5", "golds": golds})


def test_official_folder_prefers_dev_and_matches_golds_by_id(tmp_path: Path) -> None:
    official(tmp_path, "train", ["t"], ["t"])
    assert read_users(tmp_path, TITLES).users["user_id"].to_list() == ["t"]
    official(tmp_path, "dev", ["x", "y"], ["y", "x"])
    loaded = read_users(tmp_path, TITLES)
    assert loaded.users["user_id"].to_list() == ["x", "y"]
    assert loaded.users["query"].to_list()[0] == [
        {"id": "x", "input": "of a paper: x", "gold": "title of x"}
    ]
    assert loaded.users["role"].null_count() == 2


def test_official_id_mismatch(tmp_path: Path) -> None:
    official(tmp_path, "dev", ["x", "y"], ["x"])
    error_line(tmp_path, "dev_questions.json", "record 1", "'y'", "no gold", task=TITLES)
    official(tmp_path, "dev", ["x"], ["x", "z"])
    error_line(tmp_path, "dev_outputs.json", "'z'", "no question", task=TITLES)
    (tmp_path / "dev_outputs.json").unlink()
    error_line(tmp_path, "dev_outputs.json", "No such file", task=TITLES)


def test_what_is_dropped_is_counted(tmp_path: Path) -> None:
    content = [
        user(
            1,
            movie("one"),
            movie("one"),  # the same text and answer
            movie("one", "action"),  # the same text only: kept
            movie(" \n"),
            {"id": "9", "description": "nine", "tag": None},
            movie("two", "Comedy"),  # case counts
            movie("three", " comedy "),  # stripped: kept
            query=[
                question("a", "x"),
                {"id": "b", "input": "", "gold": "comedy"},
                question("c", "x", "none"),
            ],
        ),
        user(2, movie("one", "none"), query=[question("d", "x")]),
    ]
    loaded = read_users(write(tmp_path / "users.json", content), MOVIES)
    assert loaded.dropped == {
        DUPLICATE_ITEM: 1,
        EMPTY_ITEM: 2,
        UNKNOWN_LABEL: 2,
        EMPTY_QUERY: 1,
        UNKNOWN_GOLD: 1,
        EMPTY_USER: 1,
        ORPHAN_QUERY: 1,
    }
    (kept,) = loaded.users.to_dicts()
    assert [(item["text"], item["answer"]) for item in kept["profile"]] == [
        ("one", "comedy"),
        ("one", "action"),
        ("three", "comedy"),
    ]
    assert [query["id"] for query in kept["query"]] == ["a"]


@pytest.mark.parametrize("score", [4, "4", 4.0, " 4 ", "4.0", " 4.0\n", "4e0", "+04.", "0.4e1"])
def test_ratings_become_labels(tmp_path: Path, score: Any) -> None:
    """What Python's float() reads as 4, of an item and of a gold."""
    query = {"id": "q", "input": "review: fine", "gold": score}
    path = write(
        tmp_path / "u.json", [user(1, {"id": 3, "text": "good", "score": score}, query=[query])]
    )
    loaded = read_users(path, RATINGS)
    assert loaded.users["profile"].to_list() == [[{"id": "3", "text": "good", "answer": "4"}]]
    assert loaded.users["query"].to_list() == [[query | {"gold": "4"}]]
    assert loaded.dropped == {}


@pytest.mark.parametrize("score", [4.5, "4.5", "nan", "inf", "6.0", "-4", "four", "4 stars"])
def test_what_is_no_rating(tmp_path: Path, score: Any) -> None:
    query = {"id": "q", "input": "review: fine", "gold": score}
    items = [{"text": "good", "score": score}, {"text": "bad", "score": 1}]
    loaded = read_users(write(tmp_path / "u.json", [user(1, *items, query=[query])]), RATINGS)
    assert loaded.dropped == {UNKNOWN_LABEL: 1, UNKNOWN_GOLD: 1}


def test_a_label_is_kept_as_it_is(tmp_path: Path) -> None:
    """Of a task of one's own, whose labels may look like other ratings."""
    halves = replace(RATINGS, labels=("1.0", "1.5"))
    items = [{"text": f"text {score}", "score": score} for score in ("1.0", " 1.5", "2.0")]
    loaded = read_users(write(tmp_path / "u.json", [user(1, *items)]), halves)
    assert [item["answer"] for item in loaded.users["profile"][0]] == ["1.0", "1.5"]
    assert loaded.dropped == {UNKNOWN_LABEL: 1}


def test_ratings_are_numbers_for_ratings_alone(tmp_path: Path) -> None:
    item = {"abstract": "about", "title": " 4.0 "}
    loaded = read_users(write(tmp_path / "u.json", [user(1, item)]), TITLES)
    assert loaded.users["profile"].to_list() == [[{"id": "0", "text": "about", "answer": " 4.0 "}]]


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    error_line(tmp_path / "absent", "absent", "no such file")
    error_line(tmp_path, str(tmp_path), "user_few_shot.json", "dev_questions.json")
    write(tmp_path / "test_questions.json", [])
    error_line(tmp_path, "withholds")
    path = tmp_path / "u.json"
    path.write_text(json.dumps([user(1, movie("one"))], indent=1)[:-20])
    error_line(path, "u.json", "line 10, column 4", "truncated")
    path.write_text("\n<!DOCTYPE html>")
    error_line(path, "web page")
    path.write_bytes(b"\x1f\x8b\x08")
    error_line(path, "compressed")
    path.write_text(" ")
    error_line(path, "is empty")
    path.write_text("[" * 200_000)
    error_line(path, "u.json")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({}, ["line 1 has no user_id", "one user a line or as a JSON list"]),
        ([], ["empty list"]),
        ([user(1, movie("x")), 5], ["record 1", "a number"]),
        ([{"profile": []}], ["record 0", "no user_id"]),
        ([{"id": "1", "input": "x", "profile": []}], ["record 0", "LaMP's own questions"]),
        ([{"user_id": 5}], ["record 0", "user_id '5'", "no profile"]),
        ([{"user_id": 5, "profile": None}], ["user_id '5'", "null"]),
        ([{"user_id": True, "profile": []}], ["user_id is true or false"]),
        ([user(5, movie("x"), [])], ["'5'", "profile item 1", "a list"]),
        ([user(5, {"id": "1", "tag": "x"})], ["profile item 0", "'description'", "id"]),
        ([user(5, {"description": ["x"], "tag": "x"})], ["description is a list"]),
        ([user(5, movie("\ud800"))], ["profile item 0", "half a character"]),
        ([user(5, movie("x"), query=[{"id": "q"}])], ["query 0", "'input'"]),
        ([{"user_id": 5, "profile": [], "query": {}}], ["query is a JSON object"]),
        ([user(5, movie("x")), user("5", movie("x"))], ["record 1", "user_id of record 0"]),
        (
            [user(i, movie("x"), query=[question("q", "y")]) for i in range(2)],
            ["record 1", "'q'", "record 0"],
        ),
        ([user("a\nb" + "c" * 99) | {"profile": 1}], ["'a\\nbc", "...'"]),
    ],
)
def test_error_lines(tmp_path: Path, content: Any, parts: list[str]) -> None:
    error_line(write(tmp_path / "u.json", content), "u.json", *parts)


def test_ambiguous_folders(tmp_path: Path) -> None:
    write(tmp_path / "user_few_shot.json", [user(1, movie("x"))])
    write(tmp_path / "test_100.json", [user(1, movie("x"))])
    error_line(tmp_path, "user_few_shot.json and test_100.json")
    (tmp_path / "test_100.json").unlink()
    official(tmp_path, "dev", ["x"], ["x"])
    error_line(tmp_path, "both user_few_shot.json and dev_questions.json")


# Any text that JSON and UTF-8 can hold, with something to read in it.
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        texts,
        st.tuples(
            st.lists(st.tuples(texts, texts), min_size=1, unique=True),
            st.lists(st.tuples(texts, texts), max_size=3),
        ),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, users: dict[str, Any], escaped: bool
) -> None:
    expected: list[dict[str, Any]] = [
        {
            "user_id": user_id,
            "role": None,
            "profile": [
                {"id": str(n), "text": text, "answer": answer}
                for n, (text, answer) in enumerate(items)
            ],
            "query": [
                {"id": f"{user_id}/{n}", "input": asked, "gold": gold}
                for n, (asked, gold) in enumerate(queries)
            ],
        }
        for user_id, (items, queries) in users.items()
    ]
    content = [
        {
            "user_id": row["user_id"],
            "profile": [
                {"id": i["id"], "abstract": i["text"], "title": i["answer"]} for i in row["profile"]
            ],
            "query": row["query"],
        }
        for row in expected
    ]
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    path.write_bytes(json.dumps(content, ensure_ascii=escaped).encode())
    loaded = read_users(path, TITLES)
    assert loaded.users.to_dicts() == expected
    assert loaded.dropped == {}


@needs_real_file
def test_real_file() -> None:
    loaded = read_users(REAL_FILE, MOVIES)
    assert loaded.users.height == 72
    assert loaded.users["profile"].list.len().unique().to_list() == [10]
    assert loaded.users["query"].list.len().unique().to_list() == [1]
    assert loaded.users["profile"].explode().struct.field("text").n_unique() == 212
    assert loaded.dropped == {}

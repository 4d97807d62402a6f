"""LaMP-1 as its official files have it: papers without a citation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.errors import InputError
from tasks.lamp.citations import UNASKED, ask_related, has_unasked
from tasks.lamp.definitions import ASKS, get_task, parts, question
from tasks.lamp.formats import read_users
from tasks.lamp.groups import find_groups
from tasks.lamp.kept import DUPLICATE_ITEM, EMPTY_ITEM
from tests.unit.lamp.helpers import split_of, write

TASK = get_task("LaMP-1")
SCHEMA = {
    "user_id": pl.String(),
    "group": pl.String(),
    "profile": pl.List(pl.Struct({"id": pl.String, "text": pl.String, "answer": pl.String})),
}


def table(**users: list[str]) -> pl.DataFrame:
    """user -> titles; "a_1" and "a_2" are windows over author a."""
    rows = [
        {
            "user_id": name,
            "group": name.split("_")[0],
            "profile": [{"id": t, "text": f'"{t}"', "answer": UNASKED} for t in titles],
        }
        for name, titles in users.items()
    ]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def asked(frame: pl.DataFrame, user: int = 0) -> list[tuple[str, str, str]]:
    """(title, the author's own paper, the other one) of each item."""
    found = []
    for item in frame["profile"].to_list()[user]:
        paper = parts(item["text"])
        assert paper is not None
        title, *references = paper
        own = TASK.labels.index(item["answer"])
        found.append((title, references[own], references[1 - own]))
    return found


def test_parts_undo_question() -> None:
    assert parts(question('A "b"', "c", 'd" [2]: "e')) == ('A "b"', 'c" [2]: "d', "e")
    assert parts(question("A", "b", "c")) == ("A", "b", "c")
    for text in ("", '"A"', f'"A"{ASKS}', f'"A"{ASKS} [1]: "b"'):
        assert parts(text) is None


def test_by_hand() -> None:
    """The author's nearest other title against the nearest of other authors' titles."""
    users = table(u=["red fox", "red fox runs", "blue whale"])
    others = table(v=["a red house", "green"], w=["blue sea"], u=["not this one: red fox"])
    frame, lost = ask_related(users, others, seed=0)
    assert asked(frame) == [
        ("red fox", "red fox runs", "a red house"),
        ("red fox runs", "red fox", "a red house"),
        ("blue whale", "red fox", "blue sea"),  # shares no word with either: the first
    ]
    assert (lost, has_unasked(users), has_unasked(frame)) == (0, True, False)
    assert frame["profile"].to_list()[0][0]["id"] == "red fox"


def test_what_cannot_be_asked_is_left_out_and_counted() -> None:
    one, lost = ask_related(table(u=["only"]), table(v=["other"]), seed=0)
    assert (one["profile"].to_list(), lost) == ([[]], 1)
    alone, lost = ask_related(table(u=["a", "b"]), table(u=["c"]), seed=0)
    assert (alone["profile"].to_list(), lost) == ([[]], 2)
    # A paper that both have is nothing to ask against.
    both, lost = ask_related(table(u=["a", "b"]), table(v=["a", "b"]), seed=0)
    assert (both["profile"].to_list(), lost) == ([[]], 2)


def test_windows_of_one_author_agree_on_the_order() -> None:
    """Windows see other papers, so other references, but the same answer: pooling finds them."""
    titles = [f"paper {n}" for n in range(40)]
    users = table(a_1=titles[:30], a_2=titles[10:])
    frame, _ = ask_related(users, table(v=["far", "away"]), seed=0)
    answers = [{i["id"]: i["answer"] for i in p} for p in frame["profile"].to_list()]
    shared = answers[0].keys() & answers[1].keys()
    assert len(shared) == 20
    assert all(answers[0][key] == answers[1][key] for key in shared)
    assert 10 < sum(a == "[1]" for a in {**answers[0], **answers[1]}.values()) < 30


def test_authors_are_drawn_by_the_seed() -> None:
    users = table(u=["x one", "x two"])
    others = table(**{f"v{n:02}": [f"word{n}"] for n in range(60)})
    drawn = {seed: asked(ask_related(users, others, seed)[0]) for seed in (0, 0, 1, 2, 3)}
    assert len({str(found) for found in drawn.values()}) > 1
    # Nobody's order in the table decides.
    assert asked(ask_related(users, others.reverse(), 0)[0]) == drawn[0]


def read(folder: Path, *papers: dict[str, Any]) -> tuple[list[dict[str, str]], dict[str, int]]:
    loaded = read_users(write(folder / "u.json", [{"user_id": "u", "profile": papers}]), TASK)
    profiles = loaded.users["profile"].to_list()
    return profiles[0] if profiles else [], loaded.dropped


def test_reads_official_papers(tmp_path: Path) -> None:
    profile, dropped = read(
        tmp_path,
        {"id": "1", "title": " Red fox ", "abstract": "x"},
        {"id": "2", "title": None, "abstract": "x"},
        {"id": "3", "title": "Red fox"},
        {"id": "4", "title": "Whales"},
    )
    assert profile == [
        {"id": "1", "text": '"Red fox"', "answer": UNASKED},
        {"id": "4", "text": '"Whales"', "answer": UNASKED},
    ]
    assert dropped == {EMPTY_ITEM: 1, DUPLICATE_ITEM: 1}


@pytest.mark.parametrize(
    ("papers", "words"),
    [
        ([{"id": "1", "title": "x", "citation": "y"}, {"id": "2", "title": "z"}],
         r"profile item 1 has no 'citation'"),
        ([{"id": "1", "abstract": "y"}], r"profile item 0 has no 'title'"),
        ([{"id": "1", "title": ["x"]}], "title is a list"),
    ],
)  # fmt: skip
def test_error_lines(tmp_path: Path, papers: list[Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read(tmp_path, *papers)
    assert "\n" not in str(caught.value)


def test_authors_and_leaks_are_found_before_anything_is_asked(tmp_path: Path) -> None:
    """Groups go by titles; a query about a paper of the profile is found there."""

    def user(name: str, titles: list[str], about: str) -> dict[str, Any]:
        start = "For an author who has written the paper with the title "
        query = {"id": name, "input": start + question(about, "p", "q"), "gold": "[1]"}
        profile = [{"id": t, "title": t, "abstract": ""} for t in titles]
        return {"user_id": name, "profile": profile, "query": [query]}

    users = [
        user("a", ["one", "two"], "three"),
        user("b", ["two", "three"], "four"),
        *(user(name, [f"{name} 1", f"{name} 2"], "far") for name in "cde"),
    ]
    loaded = read_users(write(tmp_path / "users.json", users), TASK).users
    assert find_groups(loaded, 0.5, TASK).to_list() == ["a", "a", "c", "d", "e"]
    split = split_of(
        loaded, TASK, seed=1, base_share=0.25, anchor_share=0.25, same_author_share=0.5
    )
    assert split.counts["groups"] == 4
    everyone = pl.concat([split.base, split.anchor, split.few_shot])
    pooled = dict(everyone.select("group", pl.col("profile").list.len()).iter_rows())
    assert pooled["a"] in (2, 3)

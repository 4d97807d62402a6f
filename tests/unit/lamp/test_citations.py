"""LaMP-1: questions built from papers, and what else has to know of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.errors import InputError
from tasks.lamp.audit import query_places
from tasks.lamp.citations import Paper, as_item, hard_negatives
from tasks.lamp.definitions import ASKS, get_task, question
from tasks.lamp.formats import read_users
from tasks.lamp.groups import find_groups
from tasks.lamp.kept import DUPLICATE_ITEM, EMPTY_ITEM, NO_NEGATIVE
from tasks.lamp.prompts import Prompts
from tests.unit.lamp.helpers import how, split_of, user, write

TASK = get_task("LaMP-1")
START = "For an author who has written the paper with the title "


def paper(title: str, citation: Any, **more: Any) -> dict[str, Any]:
    return {"id": f"id of {title}", "title": title, "abstract": "", "citation": citation, **more}


def ask(query_id: str, title: str, first: str, second: str, gold: str) -> dict[str, str]:
    return {"id": query_id, "input": START + question(title, first, second), "gold": gold}


def read(tmp_path: Path, *users: dict[str, Any]) -> tuple[pl.DataFrame, dict[str, int]]:
    loaded = read_users(write(tmp_path / "users.json", list(users)), TASK)
    return loaded.users, loaded.dropped


def test_question_is_lamps() -> None:
    """LaMP, arXiv 2304.11406, appendix: the query of LaMP-1."""
    assert START + question("A", "B", "C") == (
        'For an author who has written the paper with the title "A", which reference is related? '
        'Just answer with [1] or [2] without explanation. [1]: "B" [2]: "C"'
    )


def test_order_depends_on_title_and_citation_alone() -> None:
    labels = [as_item(f"title {n}", "own", "other")[1] for n in range(200)]
    assert labels == [as_item(f"title {n}", "own", "another")[1] for n in range(200)]
    assert 70 < labels.count("[1]") < 130  # a fair coin: 100, deviation 7
    for n in range(4):
        text, label = as_item(f"title {n}", "own", "other")
        assert text.endswith(
            '[1]: "own" [2]: "other"' if label == "[1]" else '[1]: "other" [2]: "own"'
        )


def negatives(
    texts: list[str], own: list[str], given: list[str], cited: list[set[str]] | None = None
) -> list[str | None]:
    """Without `cited` each paper has one citation."""
    rows = zip(texts, given, own, cited or [{citation} for citation in own], strict=True)
    return hard_negatives([Paper("", text, "", *rest) for text, *rest in rows])


def test_negatives_by_hand() -> None:
    texts = ["red fox", "red fox runs", "red whale", "green"]
    none = [""] * 4
    # The nearest other paper's citation; where it is the paper's own, the next nearest one's.
    assert negatives(texts, ["a", "b", "c", "d"], none) == ["b", "a", "a", "a"]
    assert negatives(texts, ["a", "a", "c", "d"], none) == ["c", "c", "a", "a"]
    assert negatives(texts, ["a", " ", "c", "d"], none)[0] == "c"
    assert negatives(texts, ["a"] * 4, none) == [None] * 4
    # The data's own, unless it is empty or the citation itself.
    given = ["x", "", "c", " "]
    assert negatives(texts, ["a", "b", "c", "d"], given) == ["x", "a", "a", "a"]
    assert negatives(texts, ["a", "b", "c", "d"], ["x"] * 4) == ["x"] * 4
    assert negatives([], [], []) == []
    # Nothing that the paper cites is asked against its citation: not the nearest, nor the given.
    cited = [{"a", "b"}, {"b"}, {"c", "d"}, {"d"}]
    assert negatives(texts, ["a", "b", "c", "d"], none, cited) == ["c", "a", "a", "a"]
    assert negatives(texts, ["a", "b", "c", "d"], ["b", "", "d", ""], cited)[0] == "c"
    assert negatives(texts[:2], ["a", "b"], none[:2], [{"a", "b"}, {"b"}]) == [None, "a"]


def test_reads_papers_as_questions(tmp_path: Path) -> None:
    profile = [
        paper("red fox", "a"),
        paper("red fox runs", "b"),
        paper("green", "c", negative="z"),
        paper("red fox", "a"),
        paper("", "d"),
        paper("blue", None),
    ]
    query = ask("q", "red", "a", "b", "[2]")
    users, dropped = read(tmp_path, user("u", *profile, query=[query]))
    (row,) = users.iter_rows(named=True)
    expected = [("red fox", "a", "b"), ("red fox runs", "b", "a"), ("green", "c", "z")]
    items = [as_item(*paper) for paper in expected]
    assert row["profile"] == [
        {"id": f"id of {title}", "text": text, "answer": label}
        for (title, _, _), (text, label) in zip(expected, items, strict=True)
    ]
    assert row["query"] == [query]
    assert dropped == {DUPLICATE_ITEM: 1, EMPTY_ITEM: 2}


def test_paper_without_anything_to_ask_against(tmp_path: Path) -> None:
    other = user("v", paper("y", "b"), paper("z", "c"))
    users, dropped = read(tmp_path, user("u", paper("x", "a")), other)
    assert users["user_id"].to_list() == ["v"]
    assert dropped[NO_NEGATIVE] == 1


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"id": "1", "citation": "x"}, "has no 'title'"),
        ({"id": "1", "title": "x", "citation": {"y": 1}}, "citation is a JSON object"),
        ({"id": "1", "title": "x", "citation": ["y", 5]}, "citation is a list with a number in it"),
        ({"id": "1", "title": "x", "citation": [["y"]]}, "citation is a list with a list in it"),
        ({"id": "1", "title": "x", "citation": ["y", None]}, "list with null in it; it must hold"),
        ({"id": "1", "title": "x", "citation": ["\ud800"]}, "half a character"),
        ({"id": "1", "title": "x", "citation": "y", "negative": {}}, "negative is a JSON object"),
        ("x", "item 0 is a string"),
    ],
)
def test_error_lines(tmp_path: Path, item: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, user("u", item))
    assert "\n" not in str(caught.value)


def test_prompts(tmp_path: Path) -> None:
    """Compact prompts leave the instruction within the text out; published ones show LaMP's."""
    query = ask("q", "red", "a", "b", "[2]")
    users, _ = read(
        tmp_path, user("u", paper("blue", "c", negative="d"), paper("red", "a"), query=[query])
    )
    (row,) = users.iter_rows(named=True)
    compact = Prompts(TASK, how(), START).of_items(row["profile"])[0]
    label = row["profile"][0]["answer"]
    shown = '[1]: "c" [2]: "d"' if label == "[1]" else '[1]: "d" [2]: "c"'
    assert (compact.prompt, compact.answer) == (f'title: "blue" {shown} citation:', label)
    (asked,) = Prompts(TASK, how(), START).of_queries(row["profile"], row["query"])
    assert asked.prompt == 'title: "red" [1]: "a" [2]: "b" citation:'
    published_prompts = Prompts(TASK, how("published", 0), START)
    (published,) = published_prompts.of_queries(row["profile"], row["query"])
    assert published.prompt == (
        f'### User Instruction:\n{START}"red"{ASKS}\nReference: [1] - a [2] - b\nAnswer:'
    )


def test_windows_of_one_author_are_found(tmp_path: Path) -> None:
    """Two windows share papers that stand against different negatives; a query's paper counts as
    standing in a profile whatever it is asked against there."""
    a = user("a", paper("one", "x"), paper("two", "y"), query=[ask("qa", "three", "p", "q", "[1]")])
    b = user(
        "b", paper("two", "y"), paper("three", "z"), query=[ask("qb", "four", "p", "q", "[1]")]
    )
    others = [
        user(name, paper(f"{name} 1", "x"), paper(f"{name} 2", "y"), query=[
            ask(name, f"{name} 3", "p", "q", "[1]")])
        for name in ("c", "d")
    ]  # fmt: skip
    users, dropped = read(tmp_path, a, b, *others)
    assert not dropped
    first, second = (users["profile"][n].to_list() for n in (0, 1))
    assert first[1]["text"] != second[0]["text"]
    assert find_groups(users, 0.5, TASK).to_list() == ["a", "a", "c", "d"]
    table = users.with_columns(group=pl.Series(["a", "a", "c", "d"]))
    assert query_places(table, table, TASK) == {"any": 1, "own": 0, "sibling": 1, "other": 0}
    split = split_of(users, TASK, seed=0, base_share=0.3, anchor_share=0.3, same_author_share=0.5)
    pooled = {
        row["user_id"]: len(row["profile"])
        for side in (split.base, split.anchor)
        for row in side.iter_rows(named=True)
    }
    assert all(size == (3 if name == "a" else 2) for name, size in pooled.items())
    assert split.counts["groups"] == 3

"""LaMP-1's papers that name several citations: one is drawn, and none of them is a wrong answer."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tasks.config.run import resolve
from tasks.lamp.definitions import LABELS, get_task, parts
from tasks.lamp.formats import Loaded, read_users
from tasks.lamp.groups import find_groups
from tasks.lamp.kept import EMPTY_ITEM
from tasks.prepare import described, prepared_users
from tasks.results.store import Store
from tasks.users import users_of
from tests.unit.lamp.helpers import user, write

TASK = get_task("LaMP-1")


def paper(title: str, citation: Any, **more: Any) -> dict[str, Any]:
    return {"id": f"id of {title}", "title": title, "abstract": "", "citation": citation, **more}


def graph(users: int, cites: int = 3) -> list[dict[str, Any]]:
    """Users of ten papers, each citing as many."""
    return [
        user(f"u{u}", *(paper(f"paper {u} {n}", [f"cited {u} {n} {k}" for k in range(cites)])
                        for n in range(10)))
        for u in range(users)
    ]  # fmt: skip


def read(tmp_path: Path, users: list[dict[str, Any]], seed: int = 0) -> Loaded:
    return read_users(write(tmp_path / "users.json", users), TASK, seed)


def references(loaded: Loaded) -> dict[str, tuple[str, str]]:
    """Title of each paper -> what is cited, and what it is asked against."""
    found = {}
    for profile in loaded.users["profile"].to_list():
        for item in profile:
            title, *shown = parts(item["text"]) or ("",)
            own = LABELS.index(item["answer"])
            found[title] = (shown[own], shown[1 - own])
    return found


def test_each_citation_is_as_likely(tmp_path: Path) -> None:
    """Of 600 papers a third each, 200 with a deviation of 11.5; another seed draws others."""
    users = graph(60)
    first = references(read(tmp_path, users))
    assert len(first) == 600
    for title, (own, other) in first.items():
        name = title.removeprefix("paper ")
        assert own.startswith(f"cited {name} ")
        assert not other.startswith(f"cited {name} ")
    drawn = Counter(own[-1] for own, _ in first.values())
    assert set(drawn) == {"0", "1", "2"}
    assert all(165 < count < 235 for count in drawn.values())
    second = references(read(tmp_path, users, seed=1))
    # Two draws of three agree in a third.
    assert 165 < sum(first[title][0] == second[title][0] for title in first) < 235


def test_no_order_matters(tmp_path: Path) -> None:
    """Nor who the user is, nor ids: windows over one author's papers are still one author."""
    users = graph(5)
    first = read(tmp_path, users)
    moved = graph(5)
    random.Random(0).shuffle(moved)
    for one in moved:
        one["user_id"] += " again"
        random.Random(1).shuffle(one["profile"])
        for item in one["profile"]:
            random.Random(2).shuffle(item["citation"])
            item["citation"] += [item["citation"][0], " "]
            item["id"] += " again"
    second = read(tmp_path, moved)
    assert references(first).keys() == references(second).keys()
    for title, (own, _) in references(first).items():
        assert references(second)[title][0] == own
    both = read(tmp_path, users + moved).users
    assert find_groups(both, 0.5, TASK).n_unique() == 5


def test_a_list_of_one_is_that_citation(tmp_path: Path) -> None:
    """As if it stood alone; an empty list is as an empty citation."""
    listed = graph(3, cites=1)
    listed[0]["profile"][0]["citation"] = []
    listed[0]["profile"][1]["citation"] = ["", " "]
    alone = graph(3, cites=1)
    for one in alone:
        for item in one["profile"]:
            item["citation"] = item["citation"][0]
    alone[0]["profile"][0]["citation"] = alone[0]["profile"][1]["citation"] = None
    found, expected = read(tmp_path, listed), read(tmp_path, alone)
    assert found.users.equals(expected.users)
    assert found.dropped == expected.dropped == {EMPTY_ITEM: 2}
    assert found.drawn == expected.drawn == 0


@pytest.mark.parametrize("seed", range(5))
def test_what_is_cited_is_no_wrong_answer(tmp_path: Path, seed: int) -> None:
    """By hand: the nearest paper's citation and the negative are cited too, so `z` is left."""
    users = [
        user(
            "u",
            paper("red fox", ["a", "b"]),
            paper("red fox runs", "b"),
            paper("red whale", "a"),
            paper("green", "z"),
            paper("blue", ["c", "d", "e"], negative="d"),
        )
    ]
    found = references(read(tmp_path, users, seed))
    assert found["red fox"][1] == "z"
    assert found["blue"][1] not in ("c", "d", "e")


def test_prepare_counts_and_says_it(where: Store, tmp_path: Path) -> None:
    """20 of 120 papers have one citation; the run's seed is the one that draws."""
    users = graph(12)
    for number, one in enumerate(users):
        title = f"query {number}"
        asked = f'... with the title "{title}", which?'
        one["query"] = [{"id": f"q{number}", "input": asked, "gold": "[1]"}]
        for item in one["profile"][: 10 if number < 2 else 0]:
            item["citation"] = item["citation"][:1]
    file = write(tmp_path / "users.json", users)
    drawn = []
    for seed in (0, 1):
        config = resolve({"data": str(file), "anchors": {"min_items": 1}})
        prepared = prepared_users(config.for_task("LaMP-1", seed))
        assert prepared.counts["papers_asked_by_a_drawn_citation"] == 100
        assert "papers asked by a drawn citation: 100" in described(prepared, "grouped")
        texts = {
            item["text"]
            for table in (prepared.base, prepared.anchor, prepared.few_shot)
            for one in users_of(table)
            for item in one["profile"]
        }
        expected = read_users(file, TASK, seed).users["profile"].explode().struct.field("text")
        assert texts == {*expected}
        drawn.append(texts)
    assert drawn[0] != drawn[1]

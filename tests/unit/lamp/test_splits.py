"""The published split: which users are few-shot users, and what is left as it is."""

from __future__ import annotations

from itertools import chain
from typing import Any

import polars as pl
import pytest

from tasks.errors import InputError
from tasks.lamp.definitions import get_task
from tasks.lamp.splits import Split
from tests.unit.lamp.helpers import frame, split_of

TASK = get_task("LaMP-2M")


def split(users: pl.DataFrame, **given: Any) -> Split:
    options: dict[str, Any] = {
        "kind": "published",
        "base_share": 0.25,
        "anchor_share": 0.25,
        "same_author_share": 0.5,
        "few_shot_users": 100,
        "few_shot_items": 3,
    }
    return split_of(users, TASK, **(options | given))


def texts(user: str, count: int) -> list[str]:
    return [f"{user} text {number}" for number in range(count)]


def population(lengths: dict[str, int], silent: str = "") -> pl.DataFrame:
    """Users of so many items each; all but `silent` ones have a query."""
    return frame(
        {user: texts(user, count) for user, count in lengths.items()},
        {user: [f"{user} asks"] for user in lengths if user not in silent},
    )


def sides(found: Split) -> dict[str, list[str]]:
    parts = {"base": found.base, "anchor": found.anchor, "few_shot": found.few_shot}
    return {name: part["user_id"].to_list() for name, part in parts.items()}


def test_few_shot_users_have_exactly_as_many_items() -> None:
    """Those with exactly n first, then the next longer, which keep their last n items."""
    users = population({"a": 9, "b": 3, "c": 2, "d": 5, "e": 3, "f": 8, "g": 7, "h": 4})
    found = split(users)
    assert sides(found)["few_shot"] == ["b", "d", "e", "h"]
    profiles = dict(found.few_shot.select("user_id", "profile").iter_rows())
    assert {len(profile) for profile in profiles.values()} == {3}
    assert [item["text"] for item in profiles["d"]] == texts("d", 5)[2:]
    # (5 - 3) + (4 - 3) items of d and h are never seen.
    assert found.counts["unseen_few_shot_items"] == 3
    others = sides(found)["base"] + sides(found)["anchor"]
    assert sorted(others) == ["a", "c", "f", "g"]
    assert len(sides(found)["base"]) == 2
    # The others keep all they have.
    kept = pl.concat([found.base, found.anchor])
    assert dict(kept.select("user_id", pl.col("profile").list.len()).iter_rows()) == {
        "a": 9, "c": 2, "f": 8, "g": 7,
    }  # fmt: skip


def test_at_most_as_many_as_asked_and_only_who_asks() -> None:
    users = population(dict.fromkeys("abcdefgh", 3), silent="ab")
    assert len(sides(split(users, few_shot_users=2))["few_shot"]) == 2
    chosen = sides(split(users))["few_shot"]
    assert len(chosen) == 4  # half of eight are left by the shares
    assert not {"a", "b"} & set(chosen)


def test_fewer_few_shot_users_of_roles_that_the_data_give() -> None:
    """Those left out are on no other side; which are taken depends on the seed alone."""
    names = {"a": "base", "b": "anchor"} | dict.fromkeys("cdefgh", "few_shot")
    users = frame(
        {user: texts(user, 3) for user in names}, {user: ["?"] for user in names}, roles=names
    )
    options = {"kind": "grouped", "base_share": 0.25, "few_shot_items": None, "few_shot_users": 2}
    found = split_of(users, TASK, **options)
    assert len(sides(found)["few_shot"]) == 2
    assert (sides(found)["base"], sides(found)["anchor"]) == (["a"], ["b"])
    assert found.counts["few_shot_users_left_out"] == 4
    drawn = {tuple(sides(split_of(users, TASK, seed, **options))["few_shot"]) for seed in range(9)}
    assert len(drawn) > 1


def test_ten_items_unless_said_otherwise() -> None:
    users = population({"a": 10, "b": 11, "c": 12, "d": 9})
    found = split(users, few_shot_items=None)
    assert sides(found)["few_shot"] == ["a", "b"]
    assert found.few_shot["profile"].list.len().to_list() == [10, 10]


def test_the_seed_decides_and_nothing_else() -> None:
    users = population({f"u{n:02}": 5 for n in range(40)})
    first = sides(split(users))
    assert first == sides(split(users.reverse()))
    assert first != sides(split(users, seed=1))
    shares = split(users, base_share=0.6, anchor_share=0.2)
    assert {name: len(found) for name, found in sides(shares).items()} == {
        "base": 24, "anchor": 8, "few_shot": 8,
    }  # fmt: skip
    assert not sides(split(users, base_share=0.0, anchor_share=0.5))["base"]


def test_authors_stand_on_several_sides_and_are_counted() -> None:
    """Twelve windows over one author: all are users of their own, nobody is pooled."""
    shared = texts("author", 6)
    names = [f"w{n:02}" for n in range(12)]
    users = frame(dict.fromkeys(names, shared), {name: [f"{name} asks"] for name in names})
    found = split(users)
    assert sorted(chain(*sides(found).values())) == names
    assert found.counts["groups"] == 1
    assert (
        found.counts["shared_author"]
        == found.counts["base_users"] + (found.counts["anchor_candidates"])
    )
    assert found.counts["pooled_users"] == found.counts["removed_shared_group"] == 0


def test_roles_are_taken_as_they_are() -> None:
    """Per-Pcs' files: nobody moves, is pooled, cut or left out, whoever shares content."""
    shared = texts("x", 4)
    profiles = {"b": shared, "a": shared, "a2": texts("y", 2), "f": shared, "g": texts("z", 9)}
    roles = {"b": "base", "a": "anchor", "a2": "anchor", "f": "few_shot", "g": "few_shot"}
    users = frame(profiles, {"f": ["f asks", "x text 0"], "g": ["g asks"]}, roles)
    found = split(users)
    assert sides(found) == {"base": ["b"], "anchor": ["a", "a2"], "few_shot": ["f", "g"]}
    assert found.few_shot["profile"].list.len().to_list() == [4, 9]
    counts = found.counts
    assert (counts["shared_author"], counts["unseen_few_shot_items"]) == (2, 0)
    assert (counts["queries"], counts["queries_in_other_profiles"]) == (3, 1)
    assert counts["queries_in_own_profile"] == 1


@pytest.mark.parametrize(
    ("users", "given", "words"),
    [
        (population({"a": 2, "b": 2}), {}, "no user with a query has 3 items, the longest of 2"),
        (population({"a": 3, "b": 9}, silent="ab"), {}, "no user with a query has 3 items"),
        (population({"a": 3}), {}, "no anchor candidate user is left of 1 users"),
        (frame({"a": ["x"], "b": ["y"]}, roles={"a": "base", "b": "anchor"}), {}, "no few-shot"),
    ],
)  # fmt: skip
def test_error_lines(users: pl.DataFrame, given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        split(users, **given)
    assert "\n" not in str(caught.value)

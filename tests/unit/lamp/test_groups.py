"""Authors: who is one, and that none stands on two sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks.lamp.groups as groups_module
from tasks.errors import InputError
from tasks.lamp.audit import audit, query_places
from tasks.lamp.definitions import get_task
from tasks.lamp.formats import read_users
from tasks.lamp.groups import find_groups
from tasks.lamp.splits import Split
from tests.unit.lamp.helpers import REAL_FILE, frame, needs_real_file, split_of

TASK = get_task("LaMP-2M")
THIRDS: dict[str, Any] = {"base_share": 1 / 3, "anchor_share": 1 / 3, "same_author_share": 0.5}


def windows(authors: int, per_author: int = 3, queries: bool = True) -> pl.DataFrame:
    """Sliding windows: window w of an author holds its items w .. w + 9, its query is w + 10."""
    profiles = {
        f"u{author:03d}-{w}": [f"a{author} i{n}" for n in range(w, w + 10)]
        for author in range(authors)
        for w in range(per_author)
    }
    asked = {u: [f"{texts[-1][:-1]}{int(texts[-1][-1]) + 1}"] for u, texts in profiles.items()}
    return frame(profiles, asked if queries else None)


def test_share_is_of_the_smaller_profile_and_transitive() -> None:
    users = frame(
        {
            "d": ["1", "2", "3", "4"],
            "c": ["3", "4", "5", "6"],  # half of d
            "b": ["6", "5"],  # all of b in c
            "a": ["1", "8", "9", "10"],  # a quarter of d
        }
    )
    assert find_groups(users, 0.5, TASK).to_list() == ["b", "b", "b", "a"]
    assert find_groups(users, 0.51, TASK).to_list() == ["d", "b", "b", "a"]
    assert find_groups(users, 0.25, TASK).to_list() == ["a", "a", "a", "a"]


def test_same_text_with_another_answer_is_not_shared() -> None:
    users = frame({"a": ["1"], "b": ["1"]})
    other = users.to_dicts()
    other[1]["profile"][0]["answer"] = "action"
    assert find_groups(users, 1.0, TASK).to_list() == ["a", "a"]
    assert find_groups(pl.DataFrame(other, schema=users.schema), 0.1, TASK).to_list() == ["a", "b"]


def test_same_user_id_is_one_author() -> None:
    users = pl.concat([frame({"a": ["1"]}, roles={"a": r}) for r in ("base", "anchor")])
    assert find_groups(users, 0.5, TASK).to_list() == ["a", "a"]


profiles = st.lists(
    st.lists(st.integers(0, 12), min_size=1, max_size=10, unique=True), min_size=1, max_size=12
)


@settings(max_examples=80, deadline=None)
@given(profiles, st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0]), st.sampled_from([1, 4, 99]))
def test_groups_equal_the_comparison_of_all_pairs(
    lists: list[list[int]], share: float, matches: int
) -> None:
    ids = [f"{n:02d}" for n in range(len(lists))]
    expected = {n: ids[n] for n in range(len(lists))}
    changed = True
    while changed:
        changed = False
        for a, left in enumerate(lists):
            for b, right in enumerate(lists):
                common = len(set(left) & set(right))
                needed = share * min(len(left), len(right)) - 1e-9
                if common and common >= needed and expected[b] < expected[a]:
                    expected[a] = expected[b]
                    changed = True
    users = frame({i: [str(n) for n in items] for i, items in zip(ids, lists, strict=True)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups_module, "PREFIX_MATCHES", matches)
        patch.setattr(groups_module, "JOINED_ROWS", 20)  # several batches
        assert find_groups(users, share, TASK).to_list() == [expected[n] for n in range(len(lists))]


def sides(split: Split) -> dict[str, str]:
    return {
        group: side
        for side in ("base", "anchor", "few_shot")
        for group in getattr(split, side)["group"]
    }


def test_split_of_windows() -> None:
    split = split_of(windows(9), TASK, seed=0, **THIRDS)
    assert split.counts == {
        "users": 27,
        "users_with_query": 27,
        "groups": 9,
        "removed_shared_group": 0,
        "removed_few_shot_without_query": 0,
        "base_users": 3,
        "anchor_candidates": 3,
        "few_shot_users": 9,
        "few_shot_groups": 3,
        "pooled_users": 12,
        "unseen_few_shot_items": 0,
        "queries": 9,
        "queries_in_other_profiles": 0,
        "queries_in_few_shot_profiles": 6,  # the last window's query is in no window
        "queries_in_own_profile": 0,
        "few_shot_users_left_out": 0,
    }
    for name in ("base", "anchor", "few_shot"):
        side = getattr(split, name)
        assert side.columns == ["user_id", "group", "profile", "query"]
        assert side["user_id"].is_sorted()
    pooled = split.anchor.row(0, named=True)
    assert pooled["user_id"] == pooled["group"]
    texts = [item["text"] for item in pooled["profile"]]
    author = texts[0].split()[0]
    assert texts == [f"{author} i{n}" for n in range(12)]


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 12), st.integers(0, 50), st.randoms(use_true_random=False))
def test_no_author_on_two_sides_and_row_order_does_not_matter(
    authors: int, seed: int, random: Any
) -> None:
    users = windows(authors)
    split = split_of(users, TASK, seed=seed, **THIRDS)
    found = [set(getattr(split, s)["group"]) for s in ("base", "anchor", "few_shot")]
    assert sum(map(len, found)) == len(set.union(*found)) == authors
    order = list(range(users.height))
    random.shuffle(order)
    again = split_of(users[order], TASK, seed=seed, **THIRDS)
    assert again.counts == split.counts
    for side in ("base", "anchor", "few_shot"):
        assert getattr(again, side).equals(getattr(split, side))


def test_a_new_item_moves_nobody_and_the_seed_does() -> None:
    users = windows(12)
    before = sides(split_of(users, TASK, seed=3, **THIRDS))
    rows = users.to_dicts()
    rows[7]["profile"].append({"id": "new", "text": "new", "answer": "comedy"})
    changed = pl.DataFrame(rows, schema=users.schema)
    assert sides(split_of(changed, TASK, seed=3, **THIRDS)) == before
    others = [sides(split_of(users, TASK, seed=seed, **THIRDS)) for seed in range(5)]
    assert len({json.dumps(other, sort_keys=True) for other in others}) > 1


def test_groups_without_queries_become_base_and_anchor() -> None:
    asking = windows(2)
    silent = windows(10, queries=False)[6:]
    split = split_of(pl.concat([asking, silent]), TASK, seed=0, **THIRDS)
    assert split.counts["few_shot_users"] == split.few_shot.height
    assert all(len(queries) for queries in split.few_shot["query"].to_list())
    assert split.counts["base_users"] + split.counts["anchor_candidates"] == 10 - len(
        set(split.few_shot["group"])
    )


def with_roles() -> pl.DataFrame:
    """Three users of the base and anchor sides have a few-shot or anchor user's content."""
    return frame(
        {
            "base": ["1", "2"],
            "base of few": ["f1", "f2"],
            "base of anchor": ["a1", "a2"],
            "anchor": ["a1", "a2", "asked"],
            "anchor of few": ["f1"],
            "few": ["f1", "f2"],
            "silent": ["9"],
        },
        {"few": ["asked", "f2"]},
        {
            "base": "base",
            "base of few": "base",
            "base of anchor": "base",
            "anchor": "anchor",
            "anchor of few": "anchor",
            "few": "few_shot",
            "silent": "few_shot",
        },
    )


def test_given_roles_are_kept_and_shared_authors_removed_if_allowed() -> None:
    split = split_of(with_roles(), TASK, seed=0, **THIRDS, allow_shared_groups=True)
    assert split.base["user_id"].to_list() == ["base"]
    assert split.anchor["profile"].list.len().to_list() == [3]
    assert split.few_shot["user_id"].to_list() == ["few"]
    assert split.counts["removed_shared_group"] == 3
    assert split.counts["removed_few_shot_without_query"] == 1
    assert split.counts["queries_in_other_profiles"] == 1
    assert split.counts["queries_in_few_shot_profiles"] == 1
    assert split.counts["queries_in_own_profile"] == 1


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        # "f1" is half of few's profile; of all the pairs the one with an anchor is worst.
        ([], "3 base or anchor .* anchor user 'anchor of few' with few_shot user 'few'"),
        (["anchor of few"], "2 base or anchor .* base user 'base of few' with few_shot user 'few'"),
        (["anchor of few", "base of few"], "1 base .* base user 'base of anchor' with anchor user"),
    ],
)
def test_roles_that_put_an_author_on_two_sides(left_out: list[str], message: str) -> None:
    users = with_roles().filter(~pl.col("user_id").is_in(left_out))
    with pytest.raises(InputError, match=message) as caught:
        split_of(users, TASK, seed=0, **THIRDS)
    assert "split.same_author_share 0.5" in str(caught.value)
    assert "split.allow_shared_groups=true" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whoever_deals_out_sides_never_puts_an_author_on_two() -> None:
    """Where the data has no roles there is nothing to refuse, with the option or without."""
    for allowed in (False, True):
        split = split_of(windows(9), TASK, seed=0, **THIRDS, allow_shared_groups=allowed)
        assert split.counts["removed_shared_group"] == 0
        assert split.users.group_by("group").agg(pl.col("role").n_unique())["role"].max() == 1


def test_roles_may_leave_base_out() -> None:
    users = frame({"a": ["1"], "f": ["2"]}, {"f": ["3"]}, {"a": "anchor", "f": "few_shot"})
    assert split_of(users, TASK, seed=0, **THIRDS).base.is_empty()
    no_base = split_of(
        windows(4), TASK, seed=0, base_share=0.0, anchor_share=0.5, same_author_share=0.5
    )
    assert no_base.base.is_empty()
    assert no_base.base.columns[1] == "group"


@pytest.mark.parametrize(
    ("users", "message"),
    [
        (windows(1), "no anchor candidate"),
        (windows(2), "no few-shot"),
        (windows(6, queries=False), "none of 18 users has a query.*add queries"),
        (frame({}), "no anchor candidate user is left of 0 users"),
        (frame({"a": ["1"]}, roles={"a": "anchor"}), "no few-shot.*add few-shot users"),
    ],
)
def test_error_lines(users: pl.DataFrame, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        split_of(users, TASK, seed=0, **THIRDS)
    assert "\n" not in str(caught.value)


@needs_real_file
def test_real_file_facts() -> None:
    """shared/data/lamp/README.md, facts measured on the file by its collector."""
    users = read_users(REAL_FILE, TASK).users
    users = users.with_columns(find_groups(users, 0.5, TASK))
    assert users["group"].value_counts()["count"].to_list() == [3] * 24
    assert audit(users, {}, TASK)["queries"]["all"]["text_and_answer"] == {
        "any": 72,
        "own": 0,
        "sibling": 72,
        "other": 20,
    }
    assert query_places(users, users, TASK)["other"] == 24  # with another tag there
    split = split_of(users.drop("group"), TASK, seed=0, **THIRDS)
    assert split.base["profile"].list.len().to_list() == [11] * 8
    assert split.anchor["profile"].list.len().to_list() == [11] * 8
    assert split.few_shot["profile"].list.len().to_list() == [10] * 24
    assert split.counts["few_shot_groups"] == 8
    assert split.counts["queries_in_few_shot_profiles"] == 24
    assert split.counts["queries_in_own_profile"] == 0


@needs_real_file
def test_order_of_the_real_file_does_not_matter(tmp_path: Path) -> None:
    records = json.loads(REAL_FILE.read_text(encoding="utf-8"))
    path = tmp_path / "reversed.json"
    path.write_text(json.dumps(records[::-1]), encoding="utf-8")
    splits = [
        split_of(read_users(file, TASK).users, TASK, seed=1, **THIRDS) for file in (REAL_FILE, path)
    ]
    assert splits[0].anchor.equals(splits[1].anchor)
    assert splits[0].counts == splits[1].counts

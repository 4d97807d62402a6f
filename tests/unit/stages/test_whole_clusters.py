"""Anchors that stand for a whole cluster: who belongs to them, and where they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.anchors import anchors, whole_clusters
from tasks.artifacts import Store, digest
from tasks.config import resolve
from tasks.prepare import prepare
from tasks.similarity import unit_vectors
from tests.unit.stages.users import result, user, write_users

IDS = ["a", "b", "c", "d", "e", "x", "y", "z"]
LABELS = [0, 0, 1, 1, 1, -1, -1, 2]


def test_by_hand() -> None:
    """d comes first of cluster 1, b of cluster 0; y is noise; nobody of cluster 2 was chosen."""
    got = whole_clusters(["d", "b", "c", "a", "y"], IDS, LABELS)
    assert got == {"d": ["d", "c", "e"], "b": ["b", "a"], "y": ["y"]}
    assert list(got) == ["d", "b", "y"]


def test_noise_stays_single() -> None:
    assert whole_clusters(["y", "x"], IDS, LABELS) == {"y": ["y"], "x": ["x"]}
    assert whole_clusters([], IDS, LABELS) == {}


@settings(deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=20), st.randoms())
def test_any_clusters(labels: list[int], random: Any) -> None:
    ids = [f"u{number}" for number in range(len(labels))]
    order = random.sample(ids, random.randint(0, len(ids)))
    got = whole_clusters(order, ids, labels)
    label_of = dict(zip(ids, labels, strict=True))
    members = [name for own in got.values() for name in own]
    # Nobody stands in two; whoever was chosen is in one; an anchor comes first in its own.
    assert len(members) == len(set(members))
    assert set(order) <= set(members)
    assert [anchor for anchor in order if anchor in got] == list(got)
    for anchor, own in got.items():
        assert own[0] == anchor
        label = label_of[anchor]
        wanted = {name for name in ids if label_of[name] == label} if label != -1 else {anchor}
        assert set(own) == wanted
        # The first of the cluster in the order.
        assert label == -1 or anchor == next(one for one in order if label_of[one] == label)


def table(where: Store, **roles: dict[str, list[float]]) -> dict[str, Any]:
    """An `embed` result with these vectors."""

    def make(out: Path) -> dict[str, Any]:
        rows = [(role, name, v) for role, ids in roles.items() for name, v in ids.items()]
        schema = {"role": pl.String, "user_id": pl.String, "vector": pl.List(pl.Float32)}
        pl.DataFrame(rows, schema=schema, orient="row").write_parquet(out / "embeddings.parquet")
        return {}

    piece = where.get("embedding", digest(repr(roles)), make)
    return {"ref": piece.ref, "value": {}, "notes": {}, "cached": False}


TEXT = {"embedding": "text"}


def test_a_cluster_stands_in_the_middle_of_its_members(where: Store) -> None:
    """a is (1, 0), b (0, 1) whatever its length: the middle is (1, 1) / sqrt 2. c stands alone.

    The bank has c first; few-shot users come in the table's order.
    """
    vectors = table(
        where,
        anchor={"a": [2.0, 0.0], "b": [0.0, 7.0], "c": [0.6, -0.8], "left out": [-1.0, 0.0]},
        few_shot={"g": [3.0, 4.0], "f": [0.0, -2.0]},
    )
    banked = {"value": {"ids": ["c", "a"], "users": {"c": ["c"], "a": ["a", "b"]}}}
    users, few_shot, bank = unit_vectors(resolve({"anchors": TEXT}), where, vectors, banked)
    assert users == ["g", "f"]
    np.testing.assert_allclose(few_shot, [[0.6, 0.8], [0.0, -1.0]], atol=1e-7)
    np.testing.assert_allclose(bank, [[0.6, -0.8], [0.5**0.5, 0.5**0.5]], atol=1e-7)
    # Cosines by hand: 0.36 - 0.64, (0.6 + 0.8) / sqrt 2; 0.8, -1 / sqrt 2.
    wanted = [[-0.28, 1.4 * 0.5**0.5], [0.8, -(0.5**0.5)]]
    np.testing.assert_allclose(few_shot @ bank.T, wanted, atol=1e-7)


def test_opposite_members_have_no_middle(where: Store) -> None:
    vectors = table(where, anchor={"a": [1.0, 0.0], "b": [-2.0, 0.0]}, few_shot={"f": [1.0, 1.0]})
    banked = {"value": {"ids": ["a"], "users": {"a": ["a", "b"]}}}
    _, _, bank = unit_vectors(resolve({"anchors": TEXT}), where, vectors, banked)
    assert bank.tolist() == [[0.0, 0.0]]


# Two groups of three around two axes; of each the second has the longest history.
POINTS = {
    "p1": [1.0, 0.1], "p2": [1.0, 0.0], "p3": [1.0, -0.1],
    "q1": [0.1, 1.0], "q2": [0.0, 1.0], "q3": [-0.1, 1.0],
}  # fmt: skip
ITEMS = {"p1": 2, "p2": 6, "p3": 3, "q1": 3, "q2": 5, "q3": 4}


@pytest.mark.parametrize(
    ("train_on", "wanted"),
    [
        ("user", {"p2": (6, ["p2"]), "q2": (5, ["q2"])}),
        ("cluster", {"p2": (11, ["p2", "p1", "p3"]), "q2": (12, ["q2", "q1", "q3"])}),
    ],
)
def test_the_stage_names_members_and_their_items(
    where: Store, tmp_path: Path, train_on: str, wanted: dict[str, Any]
) -> None:
    """Of each k-means cluster the longest history, 6 and 5 items; p1 alone has too few (2 of 3).

    It belongs to its cluster all the same.
    """
    data = write_users(
        tmp_path / "data",
        base=[user("base-1", 2)],
        anchor=[user(name, items) for name, items in ITEMS.items()],
        few_shot=[user("few-1", 2, queries=1)],
    )
    chosen = TEXT | {"clustering": "kmeans", "count": 2, "min_items": 3, "train_on": train_on}
    config = resolve({"data": str(data), "anchors": chosen}).model_dump(mode="json")
    prepared = result(prepare.fn(config, "LaMP-2M"))
    vectors = table(where, anchor=POINTS, few_shot={"few-1": [1.0, 1.0]})
    value = result(anchors.fn(config, "LaMP-2M", prepared, vectors))["value"]
    got = {one["user_id"]: (one["items"], one["members"]) for one in value["anchors"]}
    assert got == wanted
    assert (value["clusters"], value["eligible"], value["candidates"]) == (2, 5, 6)
    per_job = config | {"anchors": config["anchors"] | {"per_job": 4}}
    assert anchors.fn(per_job, "LaMP-2M", prepared, vectors).name == "Cached"

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
from tasks.config import resolve
from tasks.prepare import prepare
from tasks.similarity import unit_vectors
from tasks.store.artifacts import Store
from tasks.store.pieces import digest
from tests.unit.stages.users import result, user, write_users

IDS = ["a", "b", "c", "d", "e", "x", "y", "z"]
LABELS = [0, 0, 1, 1, 1, -1, -1, 2]


def test_by_hand() -> None:
    """x and y are noise, which is no cluster."""
    got = whole_clusters(IDS, LABELS)
    assert got == {"cluster-0": ["a", "b"], "cluster-1": ["c", "d", "e"], "cluster-2": ["z"]}
    assert list(got) == ["cluster-0", "cluster-1", "cluster-2"]
    assert whole_clusters(["x", "y"], [-1, -1]) == {}


@settings(deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=20))
def test_any_clusters(labels: list[int]) -> None:
    """Everybody but noise is in the one cluster of their label, in the order given."""
    ids = [f"u{number}" for number in range(len(labels))]
    got = whole_clusters(ids, labels)
    assert set(got) == {f"cluster-{label}" for label in labels if label != -1}
    for name, own in got.items():
        assert own == [
            one
            for one, label in zip(ids, labels, strict=True)
            if name.endswith(f"-{label}") and label != -1
        ]


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
WHOLE = {"of p": (11, ["p1", "p2", "p3"]), "of q": (12, ["q1", "q2", "q3"])}
ITEMS = {"p1": 2, "p2": 6, "p3": 3, "q1": 3, "q2": 5, "q3": 4}


@pytest.mark.parametrize(
    ("train_on", "wanted"),
    [
        ("user", {"p2": (6, ["p2"]), "q2": (5, ["q2"])}),
        ("cluster", WHOLE),
        ("both", WHOLE | {"p2": (6, ["p2"]), "q2": (5, ["q2"])}),
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
    # Which of the two clusters has which number is k-means' affair.
    names = {
        one["user_id"]: f"of {one['members'][0][0]}"
        for one in value["anchors"]
        if one["user_id"].startswith("cluster-")
    }
    got = {
        names.get(one["user_id"], one["user_id"]): (one["items"], one["members"])
        for one in value["anchors"]
    }
    assert got == wanted
    assert (value["clusters"], value["eligible"], value["candidates"]) == (2, 5, 6)
    per_job = config | {"anchors": config["anchors"] | {"per_job": 4}}
    assert anchors.fn(per_job, "LaMP-2M", prepared, vectors).name == "Cached"


def choose_of(
    where: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], **options: Any
) -> tuple[dict[str, Any], list[str]]:
    """The `anchors` result over POINTS with histories of ITEMS, and what was logged of it."""
    data = write_users(
        tmp_path / "data",
        base=[user("base-1", 2)],
        anchor=[user(name, items) for name, items in ITEMS.items()],
        few_shot=[user("few-1", 2, queries=1)],
    )
    given = {"data": str(data), "anchors": TEXT | options, "methods": ["merge_only"]}
    config = resolve(given).model_dump(mode="json")
    prepared = result(prepare.fn(config, "LaMP-2M"))
    vectors = table(where, anchor=POINTS, few_shot={"few-1": [1.0, 1.0]})
    capsys.readouterr()
    state = anchors.fn(config, "LaMP-2M", prepared, vectors)
    logged = capsys.readouterr().out.splitlines()
    return (state.result() if state.is_completed() else {"message": state.message}), logged


KMEANS = {"clustering": "kmeans", "count": 2}


@pytest.mark.parametrize(
    ("options", "words", "rings"),
    [
        (
            KMEANS | {"train_on": "user", "min_items": 6},
            "1 users of 2 asked, from 6 candidates (1 with 6 items or more)",
            {"p2": 0},
        ),
        # No single user has 11 items, both clusters together do: 11 and 12.
        (
            KMEANS | {"train_on": "cluster", "min_items": 11},
            "2 whole clusters, from 6 candidates",
            {},
        ),
        # One has fewer.
        (
            KMEANS | {"train_on": "cluster", "min_items": 12},
            "1 whole clusters, from 6 candidates",
            {},
        ),
        (
            KMEANS | {"train_on": "both", "min_items": 5},
            "2 whole clusters and 2 users of 2 asked, from 6 candidates (2 with 5 items or more)",
            {"p2": 2, "q2": 3},
        ),
        # No cluster has 13: the longest histories stand in, and none has so many either.
        (KMEANS | {"train_on": "cluster", "min_items": 13}, None, {}),
    ],
    ids=["users", "clusters", "one cluster", "both", "none"],
)
def test_what_is_said_of_the_anchors_is_what_there_is(
    where: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    words: str | None,
    rings: dict[str, int],
) -> None:
    """ITEMS by hand: p2 has 6 and q2 5 items alone, their clusters 11 and 12."""
    chosen, logged = choose_of(where, tmp_path, capsys, **options)
    if words is None:
        assert chosen["message"] == (
            "LaMP-2M: no anchor: none of 6 candidates has anchors.min_items 13 items or more, the "
            "longest history has 6; lower it or give longer histories"
        )
        return
    assert logged == [f"LaMP-2M: anchors: {words} in 2 clusters, 0 noise"]
    frame = pl.read_parquet(where.open(chosen["ref"]).folder / "anchors.parquet")
    alone = frame.filter(pl.col("order").is_not_null())
    assert dict(zip(alone["user_id"], alone["order"], strict=True)) == rings


def test_noise_is_named_where_it_is_left_out(
    where: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two groups of three, but no cluster of at least four: all six are noise to HDBSCAN.

    With fewer than twice `min_cluster_size` candidates all would be one cluster, so it is 3 with
    six `min_samples`, which leaves no dense place.
    """
    options = {"min_cluster_size": 3, "min_samples": 6, "min_items": 5, "noise": "never"}
    chosen, _ = choose_of(where, tmp_path, capsys, **options)
    assert chosen["message"] == (
        "LaMP-2M: no anchor: the 2 candidates with anchors.min_items 5 items or more are all "
        "noise, which anchors.noise never leaves out; use noise last, or a smaller "
        "anchors.min_cluster_size"
    )


def test_the_map_rings_what_the_bank_holds() -> None:
    """Middles by hand: of p (0, 0), (2, 0), (1, 3) it is (1, 1). An anchor that failed has none."""
    from tasks.report.charts import users_map

    frame = pl.DataFrame(
        {
            "role": ["anchor"] * 5 + ["few_shot"],
            "user_id": ["p1", "p2", "p3", "q1", "q2", "few"],
            "cluster": [0, 0, 0, 1, 1, None],
            "x": [0.0, 2.0, 1.0, 5.0, 6.0, 1.0],
            "y": [0.0, 0.0, 3.0, 5.0, 6.0, 1.0],
            "order": [0, 1, 2, 3, 4, None],
        }
    )
    figure = users_map(frame, {"cluster-0": ["p1", "p2", "p3"], "q2": ["q2"]}, "title")
    drawn = {c.get_label(): c.get_offsets().tolist() for c in figure.axes[0].collections}
    rings = {name: at for name, at in drawn.items() if name.startswith("anchor")}
    assert rings == {"anchor, a whole cluster (1)": [[1.0, 1.0]], "anchor (1)": [[6.0, 6.0]]}

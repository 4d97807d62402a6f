"""Anchors that stand for a whole cluster: who belongs to them, and where they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tasks.anchors import anchors, clusters, described
from tasks.config.options import AnchorOptions
from tasks.config.run import resolve
from tasks.errors import InputError
from tasks.fusion import unit_vectors
from tasks.prepare import prepare, source
from tasks.record import File
from tasks.results.models import Anchors
from tasks.results.store import store
from tests.unit.stages.users import user, write_users
from tests.unit.stages.vectors import bank_of, embedded

pytestmark = pytest.mark.usefixtures("where")


def test_a_cluster_stands_in_the_middle_of_its_members() -> None:
    """a is (1, 0), b (0, 1) whatever its length: the middle is (1, 1) / sqrt 2. c stands alone.

    The bank has c first; few-shot users come in the table's order.
    """
    vectors = embedded(
        anchor={"a": [2.0, 0.0], "b": [0.0, 7.0], "c": [0.6, -0.8], "left out": [-1.0, 0.0]},
        few_shot={"g": [3.0, 4.0], "f": [0.0, -2.0]},
    )
    users, few_shot, bank = unit_vectors(vectors, bank_of({"c": ["c"], "a": ["a", "b"]}))
    assert users == ["g", "f"]
    np.testing.assert_allclose(few_shot, [[0.6, 0.8], [0.0, -1.0]], atol=1e-7)
    np.testing.assert_allclose(bank, [[0.6, -0.8], [0.5**0.5, 0.5**0.5]], atol=1e-7)
    # Cosines by hand: 0.36 - 0.64, (0.6 + 0.8) / sqrt 2; 0.8, -1 / sqrt 2.
    wanted = [[-0.28, 1.4 * 0.5**0.5], [0.8, -(0.5**0.5)]]
    np.testing.assert_allclose(few_shot @ bank.T, wanted, atol=1e-7)


def test_opposite_members_have_no_middle() -> None:
    vectors = embedded(anchor={"a": [1.0, 0.0], "b": [-2.0, 0.0]}, few_shot={"f": [1.0, 1.0]})
    _, _, bank = unit_vectors(vectors, bank_of({"a": ["a", "b"]}))
    assert bank.tolist() == [[0.0, 0.0]]


# Two groups of three around two axes; of each the second has the longest history.
POINTS = {
    "p1": [1.0, 0.1], "p2": [1.0, 0.0], "p3": [1.0, -0.1],
    "q1": [0.1, 1.0], "q2": [0.0, 1.0], "q3": [-0.1, 1.0],
}  # fmt: skip
WHOLE = {"of p": (11, ["p1", "p2", "p3"]), "of q": (12, ["q1", "q2", "q3"])}
ITEMS = {"p1": 2, "p2": 6, "p3": 3, "q1": 3, "q2": 5, "q3": 4}


def candidates(tmp_path: Path) -> File:
    """The table of the users of ITEMS."""
    data = write_users(
        tmp_path / "data",
        base=[user("base-1", 2)],
        anchor=[user(name, items) for name, items in ITEMS.items()],
        few_shot=[user("few-1", 2, queries=1)],
    )
    config = resolve({"data": str(data)}).for_task("LaMP-2M", 0)
    return prepare(source(config), config.split, config.task, config.seed).anchor


def chosen(table: File, **options: Any) -> Anchors:
    vectors = embedded(anchor=POINTS, few_shot={"few-1": [1.0, 1.0]})
    chosen_by = AnchorOptions(**options)
    return anchors(chosen_by, vectors, table, clusters(chosen_by, vectors, 0))


KMEANS = {"clustering": "kmeans", "count": 2}


@pytest.mark.parametrize(
    ("train_on", "wanted"),
    [
        ("user", {"p2": (6, ["p2"]), "q2": (5, ["q2"])}),
        ("cluster", WHOLE),
        ("both", WHOLE | {"p2": (6, ["p2"]), "q2": (5, ["q2"])}),
    ],
)
def test_the_stage_names_members_and_their_items(
    tmp_path: Path, train_on: str, wanted: dict[str, Any]
) -> None:
    """Of each k-means cluster the longest history, 6 and 5 items; p1 alone has too few (2 of 3).

    It belongs to its cluster all the same.
    """
    table = candidates(tmp_path)
    found = chosen(table, **KMEANS, min_items=3, train_on=train_on)
    # Which of the two clusters has which number is k-means' affair.
    names = {
        one.name: f"of {one.members[0][0]}"
        for one in found.anchors
        if one.name.startswith("cluster-")
    }
    got = {names.get(one.name, one.name): (one.items, list(one.members)) for one in found.anchors}
    assert got == wanted
    assert (found.clusters, found.eligible, found.candidates) == (2, 5, 6)
    options = AnchorOptions(clustering="kmeans", train_on=train_on)  # type: ignore[arg-type]
    vectors = embedded(anchor=POINTS, few_shot={"few-1": [1.0, 1.0]})
    found_in = clusters(options, vectors, 0)
    keys = {
        anchors.key(options.model_copy(update={name: 4}), vectors, table, found_in)
        for name in ("per_job", "min_items")
    }
    assert len(keys) == 2
    assert anchors.key(options, vectors, table, found_in) in keys


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
    tmp_path: Path, options: dict[str, Any], words: str | None, rings: dict[str, int]
) -> None:
    """ITEMS by hand: p2 has 6 and q2 5 items alone, their clusters 11 and 12."""
    table = candidates(tmp_path)
    if words is None:
        line = (
            "no anchor: none of 6 candidates has anchors.min_items 13 items or more, the longest "
            "history has 6; lower it or give longer histories"
        )
        with pytest.raises(InputError, match=rf"\A{line}\Z"):
            chosen(table, **options)
        return
    found = chosen(table, **options)
    line = f"anchors: {words} in 2 clusters, 0 noise"
    assert described(found, options["min_items"]) == line
    frame = pl.read_parquet(store().path(found.table))
    alone = frame.filter(pl.col("order").is_not_null())
    assert dict(zip(alone["user_id"], alone["order"], strict=True)) == rings


def test_noise_is_named_where_it_is_left_out(tmp_path: Path) -> None:
    """Two groups of three, but no cluster of at least four: all six are noise to HDBSCAN.

    With fewer than twice `min_cluster_size` candidates all would be one cluster, so it is 3 with
    six `min_samples`, which leaves no dense place.
    """
    options = {"min_cluster_size": 3, "min_samples": 6, "min_items": 5, "noise": "never"}
    line = (
        "no anchor: the 2 candidates with anchors.min_items 5 items or more are all noise, and "
        "anchors.noise=never excludes noise; set anchors.noise=last, or a smaller "
        "anchors.min_cluster_size"
    )
    with pytest.raises(InputError, match=rf"\A{line}\Z"):
        chosen(candidates(tmp_path), **options)


def test_the_map_rings_what_the_bank_holds() -> None:
    """Middles by hand: of p (0, 0), (2, 0), (1, 3) it is (1, 1). An anchor that failed has none."""
    from tasks.users_map import users_map

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

"""Clusters, the choice of anchors, and anchors that stand for a whole cluster."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.config.options import AnchorOptions
from tasks.method.clusters import choose, cluster, outstanding, plane, whole_clusters


def chosen(users: dict[str, tuple[int, int]], **options: Any) -> list[str]:
    """`users`: id -> (items, cluster)."""
    items, labels = (list(column) for column in zip(*users.values(), strict=True))
    return choose(list(users), items, labels, AnchorOptions(**({"min_items": 1} | options)))


# Cluster 0 has two users, cluster 1 four, noise three.
USERS = {
    "a": (50, 0),
    "b": (60, 0),
    "c": (20, 1),
    "d": (30, 1),
    "e": (10, 1),
    "f": (30, 1),
    "x": (90, -1),
    "y": (95, -1),
    "z": (15, -1),
}


def test_rounds_by_hand() -> None:
    """Larger cluster first: d (30, before f by id) and b, then f and a, c, e, then the noise."""
    assert chosen(USERS) == ["d", "b", "f", "a", "c", "e", "y", "x", "z"]


@pytest.mark.parametrize("count", range(1, 11))
def test_count_cuts_the_order(count: int) -> None:
    assert chosen(USERS, count=count) == chosen(USERS)[:count]


def test_noise_is_last_or_never() -> None:
    assert chosen(USERS, noise="never") == ["d", "b", "f", "a", "c", "e"]
    assert chosen({"x": (3, -1), "y": (5, -1)}) == ["y", "x"]
    assert chosen({"x": (3, -1), "y": (5, -1)}, noise="never") == []


def test_too_short_a_history_is_never_an_anchor() -> None:
    """Clusters stand by all their members, also those too short themselves: cluster 1 is larger."""
    assert chosen(USERS, min_items=21) == ["d", "b", "f", "a", "y", "x"]
    assert chosen(USERS, min_items=61) == ["y", "x"]
    assert chosen(USERS, min_items=96) == []
    assert chosen(USERS, min_items=30, noise="never") == ["d", "b", "f", "a"]


def test_kmeans_takes_one_per_cluster() -> None:
    """docs/method.md, stage 1: the longest profile of each cluster, if it has more than 10 items.

    The largest cluster first, then by label; nobody of cluster 2 has enough.
    """
    users = {"a": (12, 0), "b": (14, 0), "c": (11, 1), "d": (10, 2), "e": (9, 2), "f": (90, 3)}
    assert chosen(users, clustering="kmeans", min_items=11) == ["b", "c", "f"]


def test_equal_clusters_by_label_and_equal_histories_by_id() -> None:
    assert chosen({"q": (5, 1), "p": (5, 1), "s": (5, 0), "r": (5, 0)}) == ["r", "p", "s", "q"]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(-1, 3)), min_size=1, max_size=30),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from(["hdbscan", "kmeans"]),
    st.randoms(),
)
def test_any_choice(
    table: list[tuple[int, int]], count: int, least: int, clustering: str, random: Any
) -> None:
    if clustering == "kmeans":
        table = [(items, abs(label)) for items, label in table]
    users = {f"u{number:02d}": row for number, row in enumerate(table)}
    options = {"count": count, "min_items": least, "clustering": clustering}
    order = chosen(users, **options)
    assert len(set(order)) == len(order) <= count
    assert all(users[user][0] >= least for user in order)
    if clustering == "kmeans":
        labels = [users[user][1] for user in order]
        assert len(set(labels)) == len(labels)
    # The order in which candidates come does not matter.
    shuffled = list(users.items())
    random.shuffle(shuffled)
    assert chosen(dict(shuffled), **options) == order


def groups(count: int, size: int = 15, dimensions: int = 40) -> np.ndarray:
    """`size` unit vectors around each of `count` orthogonal ones, 0.05 off per coordinate."""
    generator = np.random.default_rng(count)
    turned, _ = np.linalg.qr(generator.normal(size=(dimensions, dimensions)))
    centres = turned[:count].repeat(size, axis=0)
    points = centres + generator.normal(scale=0.05, size=centres.shape)
    return np.asarray(points / np.linalg.norm(points, axis=1, keepdims=True))


@pytest.mark.parametrize(
    "options",
    [{"clustering": "hdbscan"}, {"clustering": "kmeans", "count": 2}],
    ids=["hdbscan", "kmeans"],
)
def test_two_blobs_are_two_clusters(options: dict[str, Any]) -> None:
    points, chosen_options = groups(2, 20), AnchorOptions(**options)
    labels = cluster(points, chosen_options, seed=1)
    assert all(type(label) is int for label in labels)
    assert set(labels[:20]) | {-1} in ({0, -1}, {1, -1})
    assert set(labels[20:]) | {-1} in ({0, -1}, {1, -1})
    assert set(labels[:20]) & set(labels[20:]) <= {-1}
    # HDBSCAN may call a few at the rim noise; that is no third cluster.
    assert labels.count(-1) <= 4
    np.random.seed(5)
    assert cluster(points, chosen_options, seed=1) == labels


@pytest.mark.parametrize("count", [2, 4, 7, 12])
def test_as_many_clusters_as_there_are_groups(count: int) -> None:
    """The means of n groups, less their mean, span n - 1 dimensions: these stand out of noise."""
    points, options = groups(count), AnchorOptions(clustering="silhouette")
    assert outstanding(points, seed=0).shape == (40, count - 1)
    labels = cluster(points, options, seed=0)
    assert len({*zip(labels, np.arange(count).repeat(15), strict=True)}) == count == len({*labels})
    assert max(cluster(points, AnchorOptions(clustering="silhouette", count=2), seed=0)) == 1


@pytest.mark.parametrize("points", [groups(2)[:1], groups(2)[:2], np.ones((5, 3)) / 3**0.5])
def test_nothing_to_tell_apart_is_one_cluster(points: np.ndarray) -> None:
    assert cluster(points, AnchorOptions(clustering="silhouette"), seed=0) == [0] * len(points)


def test_kmeans_with_fewer_users_than_clusters() -> None:
    labels = cluster(groups(2, 20)[:3], AnchorOptions(clustering="kmeans", count=50), seed=0)
    assert sorted(labels) == [0, 1, 2]


def test_too_few_for_two_clusters_are_one() -> None:
    assert cluster(groups(2, 20)[:9], AnchorOptions(min_cluster_size=5), seed=0) == [0] * 9


def test_plane_is_the_candidates_principal_components() -> None:
    """Against numpy's SVD of the centred candidates, up to each axis' sign."""
    generator = np.random.default_rng(1)
    points, others = generator.normal(size=(12, 5)), generator.normal(size=(4, 5))
    got = plane(points, others)
    _, _, axes = np.linalg.svd(points - points.mean(0), full_matrices=False)
    wanted = (np.concatenate([points, others]) - points.mean(0)) @ axes[:2].T
    np.testing.assert_allclose(np.abs(got), np.abs(wanted), atol=1e-10)
    assert plane(points[:1], others).tolist() == [[0.0, 0.0]] * 5


def test_plane_of_one_dimension() -> None:
    assert plane(np.ones((3, 1)), np.ones((1, 1))).shape == (4, 2)


IDS = ["a", "b", "c", "d", "e", "x", "y", "z"]
LABELS = [0, 0, 1, 1, 1, -1, -1, 2]


def test_whole_clusters_by_hand() -> None:
    """x and y are noise, which is no cluster."""
    got = whole_clusters(IDS, LABELS)
    assert got == {"cluster-0": ["a", "b"], "cluster-1": ["c", "d", "e"], "cluster-2": ["z"]}
    assert list(got) == ["cluster-0", "cluster-1", "cluster-2"]
    assert whole_clusters(["x", "y"], [-1, -1]) == {}


@settings(deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=20))
def test_any_whole_clusters(labels: list[int]) -> None:
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

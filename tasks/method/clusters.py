"""Clusters of anchor candidates, who moves where when they are fitted again by evidence
(tasks/anchors.py has the rounds), and which anchors are chosen from them.

HDBSCAN finds how many clusters there are, so it cannot be told how many anchors are wanted. The
count is met like this: within each cluster candidates stand by the length of their history, and
anchors are taken in rounds, one per cluster and round, larger clusters first. Candidates that
HDBSCAN calls noise form a last group, taken when the clusters are used up (`noise=last`) or never.
With `train_on=cluster` each whole cluster is an anchor, trained on the items of all its candidates;
`both` has those and the users. Whoever has fewer than `min_items` items, a user or a whole cluster,
is no anchor. k-means, the published way, makes `count` clusters and takes the longest history of
each.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tasks.config.options import AnchorOptions

Floats = NDArray[np.floating]
T = TypeVar("T")


def cluster(points: Floats, options: AnchorOptions, seed: int) -> list[int]:
    """Cluster number of each unit vector in `points` [U, D]; -1 is noise (HDBSCAN only).

    HDBSCAN runs on the first principal components, scaled to unit length: in hundreds of
    dimensions all distances look alike, and length is only how decided a user is. `reassign` goes
    on from its clusters with k-means (Lloyd 1982) until nobody moves: everybody, noise too, is with
    the nearest centre then.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    labels: NDArray[np.integer]
    if options.clustering == "kmeans":
        count = min(options.count, len(points))
        labels = KMeans(count, n_init=10, random_state=seed).fit_predict(points)
        return [int(label) for label in labels]
    if len(points) < 2 * options.min_cluster_size:
        # Too few for two clusters: one density estimate over all of them would call all noise.
        return [0] * len(points)
    import hdbscan

    dimensions = min(options.pca_dimensions, *points.shape)
    reduced = PCA(dimensions, svd_solver="full").fit_transform(points)
    reduced /= np.maximum(np.linalg.norm(reduced, axis=1, keepdims=True), 1e-12)
    labels = hdbscan.HDBSCAN(
        min_cluster_size=options.min_cluster_size,
        min_samples=options.min_samples,
        cluster_selection_method=options.selection,
    ).fit_predict(reduced)
    if options.reassign and labels.max() >= 0:
        centres = np.stack([reduced[labels == k].mean(axis=0) for k in range(labels.max() + 1)])
        labels = KMeans(len(centres), init=centres, n_init=1, tol=0.0).fit_predict(reduced)
    return [int(label) for label in labels]


def choose(
    ids: list[str], items: list[int], labels: list[int], options: AnchorOptions
) -> list[str]:
    """Anchor ids in order of choice, at most `options.count` (the rule stands above)."""
    groups: dict[int, list[str]] = {}
    for count, user_id, label in sorted(zip((-n for n in items), ids, labels, strict=True)):
        if -count >= options.min_items:
            groups.setdefault(label, []).append(user_id)
    noise, sizes = groups.pop(-1, []), Counter(labels)
    clusters = [groups[k] for k in sorted(groups, key=lambda label: (-sizes[label], label))]
    if options.clustering == "kmeans":
        clusters = [members[:1] for members in clusters]
    order = [one for turn in zip_longest(*clusters) for one in turn if one is not None]
    if options.noise == "last":
        order += noise
    return order[: options.count]


def members_of(
    ids: list[str], items: list[int], labels: list[int], options: AnchorOptions
) -> dict[str, list[str]]:
    """Anchor -> its members: whole clusters by number, then single users in order of choice.

    Single users also where `train_on=cluster` finds no cluster with enough items.
    """
    sizes = dict(zip(ids, items, strict=True))
    members: dict[str, list[str]] = {}
    if options.train_on != "user":
        members = {
            name: own
            for name, own in whole_clusters(ids, labels).items()
            if sum(sizes[member] for member in own) >= options.min_items
        }
    if options.train_on != "cluster" or not members:
        members |= {user_id: [user_id] for user_id in choose(ids, items, labels, options)}
    return members


def whole_clusters(ids: list[str], labels: list[int]) -> dict[str, list[str]]:
    """`cluster-<number>` -> its candidates, in the order of the numbers; noise is no cluster."""
    found = list(zip(ids, labels, strict=True))
    return {
        f"cluster-{k}": [user_id for user_id, label in found if label == k]
        for k in sorted(set(labels) - {-1})
    }


def large_clusters(labels: Sequence[int], size: int) -> list[int]:
    """The numbers, in order, of the clusters with `size` members or more; noise (-1) is none."""
    return [k for k in sorted(set(labels) - {-1}) if labels.count(k) >= size]


def shown(items: Sequence[list[T]], labels: Sequence[int], clusters: list[int]) -> list[list[T]]:
    """What each of `clusters` is trained on: the first, third, ... item of its members."""
    pairs = list(zip(items, labels, strict=True))
    return [[one for own, label in pairs if label == k for one in own[0::2]] for k in clusters]


def to_ask(nearest: Sequence[Sequence[int]], clusters: list[int]) -> list[list[bool]]:
    """[U, K]: which of `clusters` each candidate is asked: the nearest that are left, or all."""
    return [
        [k in own for k in clusters] if set(own) & set(clusters) else [True] * len(clusters)
        for own in nearest
    ]


def assign(
    labels: Sequence[int], evidence: Floats, items: list[int], clusters: list[int]
) -> list[int]:
    """Each candidate's cluster by `evidence` [U, K] for `clusters` [K], the first of equals.

    A candidate without held-out `items` stays, or becomes noise where its cluster was given up.
    """
    best = np.argmax(evidence, axis=1)
    return [
        clusters[k] if count else label if label in clusters else -1
        for k, count, label in zip(best, items, labels, strict=True)
    ]


def nearest(evidence: Floats, clusters: list[int], count: int) -> list[list[int]]:
    """Each candidate's `count` likeliest of `clusters`, best first, by `evidence` [U, K]."""
    order = np.argsort(-evidence, axis=1, kind="stable")[:, :count]
    return [[clusters[k] for k in own] for own in order.tolist()]


def plane(points: Floats, others: Floats) -> Floats:
    """Candidates and few-shot users on the candidates' first two principal components [U, 2]."""
    from sklearn.decomposition import PCA

    if min(points.shape) < 2:
        return np.zeros((len(points) + len(others), 2))
    plane = PCA(2, svd_solver="full").fit(points)
    return np.concatenate([plane.transform(points), plane.transform(others)])

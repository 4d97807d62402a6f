"""Clusters of anchor candidates, and which anchors are chosen from them.

HDBSCAN and the silhouette decide how many clusters there are, so this is not the number of anchors.
Anchors are taken in rounds, one per cluster and round, until there are `count`. Larger clusters
come first in a round, and longer histories first in a cluster. Candidates that HDBSCAN calls noise
are taken when the clusters are used up (`noise=last`), or never. k-means, the published way, makes
`count` clusters and takes the longest history of each.

With `train_on=cluster` each whole cluster is an anchor, trained on the items of all its candidates.
`both` has clusters and users. A user or cluster with fewer than `min_items` items is no anchor.
"""

from collections import Counter
from itertools import zip_longest
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tasks.config.options import AnchorOptions
from tasks.method.whitening import unit_rows

Floats = NDArray[np.floating]
T = TypeVar("T")
# Noisy copies of the vectors that a principal component must stand out from.
FLIPS = 5


def cluster(points: Floats, options: AnchorOptions, seed: int) -> list[int]:
    """Cluster number of each unit vector in `points` [U, D]; -1 is noise (HDBSCAN only).

    The published k-means clusters the vectors themselves. All others cluster their first principal
    components, scaled to unit length: in hundreds of dimensions all distances look alike, and a
    length only says how decided a user is.
    """
    labels: NDArray[np.integer]
    if options.clustering == "kmeans":
        labels = _kmeans(points, min(options.count, len(points)), seed)
    elif options.clustering == "silhouette":
        labels = best_kmeans(points, options.count, seed)
    elif len(points) < 2 * options.min_cluster_size:
        # Too few for two clusters, and HDBSCAN would call all of them noise.
        labels = np.zeros(len(points), int)
    else:
        import hdbscan

        labels = hdbscan.HDBSCAN(
            min_cluster_size=options.min_cluster_size,
            min_samples=options.min_samples,
            cluster_selection_method=options.selection,
        ).fit_predict(components(points, options.pca_dimensions))
    return [int(label) for label in labels]


def best_kmeans(points: Floats, most: int, seed: int) -> NDArray[np.integer]:
    """k-means with the number of clusters, 2 to `most`, that has the largest mean silhouette.

    It works on the principal components that stand out from noise. Silhouette: Rousseeuw 1987.
    """
    from sklearn.metrics import silhouette_score

    reduced = unit_rows((points - points.mean(axis=0)) @ outstanding(points, seed))
    different = len(np.unique(reduced.round(6), axis=0))
    tried = [
        _kmeans(reduced, count, seed)
        for count in range(2, min(most, different, len(points) - 1) + 1)
    ]
    if not tried:
        return np.zeros(len(points), int)
    return max(tried, key=lambda labels: silhouette_score(reduced, labels))


def outstanding(points: Floats, seed: int) -> Floats:
    """The first principal axes [D, d] of `points` [U, D] that stand out from noise, at least one.

    Parallel analysis (Horn 1965). In each of `FLIPS` copies all numbers get random signs: lengths
    stay, directions are lost. A component stands out while its singular value is above the largest
    of that rank among the copies.
    """
    centred = points - points.mean(axis=0)
    generator = np.random.default_rng(seed)
    noise = [
        np.linalg.svd(centred * generator.choice([-1.0, 1.0], points.shape), compute_uv=False)
        for _ in range(FLIPS)
    ]
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    above = np.cumprod(values > np.max(noise, axis=0))
    return np.asarray(axes[: max(1, above.sum())].T)


def components(points: Floats, count: int) -> Floats:
    """The first `count` principal components of `points` [U, D], each row of length 1."""
    from sklearn.decomposition import PCA

    return unit_rows(PCA(min(count, *points.shape), svd_solver="full").fit_transform(points))


def _kmeans(points: Floats, count: int, seed: int) -> NDArray[np.integer]:
    from sklearn.cluster import KMeans

    labels: NDArray[np.integer] = KMeans(count, n_init=10, random_state=seed).fit_predict(points)
    return labels


def choose(
    ids: list[str], items: list[int], labels: list[int], options: AnchorOptions
) -> list[str]:
    """Anchor ids in order of choice, at most `options.count` (rule: see the module)."""
    groups: dict[int, list[str]] = {}
    for count, user_id, label in sorted(zip((-n for n in items), ids, labels, strict=True)):
        if -count >= options.min_items:
            groups.setdefault(label, []).append(user_id)
    noise, sizes = groups.pop(-1, []), Counter(labels)
    clusters = [groups[k] for k in sorted(groups, key=lambda label: (-sizes[label], label))]
    if options.clustering == "kmeans":
        clusters = [members[:1] for members in clusters]
    order = [user_id for turn in zip_longest(*clusters) for user_id in turn if user_id is not None]
    if options.noise == "last":
        order += noise
    return order[: options.count]


def members_of(
    ids: list[str], items: list[int], labels: list[int], options: AnchorOptions
) -> dict[str, list[str]]:
    """Anchor -> its members: whole clusters by number, then single users in order of choice.

    If `train_on=cluster` finds no cluster with enough items, single users are the anchors.
    """
    sizes = dict(zip(ids, items, strict=True))
    members: dict[str, list[str]] = {}
    if options.train_on != "user":
        members = {
            name: candidates
            for name, candidates in whole_clusters(ids, labels).items()
            if sum(sizes[candidate] for candidate in candidates) >= options.min_items
        }
    if options.train_on != "cluster" or not members:
        members |= {user_id: [user_id] for user_id in choose(ids, items, labels, options)}
    return members


def whole_clusters(ids: list[str], labels: list[int]) -> dict[str, list[str]]:
    """`cluster-<number>` -> its candidates, in the order of the numbers; noise is no cluster."""
    labelled = list(zip(ids, labels, strict=True))
    return {
        f"cluster-{k}": [user_id for user_id, label in labelled if label == k]
        for k in sorted(set(labels) - {-1})
    }


def plane(points: Floats, others: Floats) -> Floats:
    """Candidates and few-shot users on the candidates' first two principal components [U, 2]."""
    from sklearn.decomposition import PCA

    if min(points.shape) < 2:
        return np.zeros((len(points) + len(others), 2))
    pca = PCA(2, svd_solver="full").fit(points)
    return np.concatenate([pca.transform(points), pca.transform(others)])

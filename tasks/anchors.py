"""Stage 4: cluster the anchor candidates and choose the anchors.

HDBSCAN finds how many clusters there are, so it cannot be told how many anchors are wanted. The
count is met like this: within each cluster candidates stand by the length of their history, and
anchors are taken in rounds, one per cluster and round, larger clusters first. Candidates that
HDBSCAN calls noise form a last group, taken when the clusters are used up (`noise=last`) or never.
With `train_on=cluster` each whole cluster is an anchor, trained on the items of all its candidates;
`both` has those and the users. Whoever has fewer than `min_items` items, a user or a whole cluster,
is no anchor. `refits` fits the clusters again by evidence before that (tasks/refit.py).
k-means, the published way, makes `count` clusters and takes the longest history of each.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config import RunConfig, derive_seed
from tasks.embedding import read_embeddings
from tasks.errors import InputError
from tasks.options import AnchorOptions
from tasks.prepare import each_user
from tasks.stage import log, stage, store
from tasks.store.pieces import Piece, digest, library_versions

if TYPE_CHECKING:
    import numpy as np

VERSION = 5


@stage(name="anchors")
def anchors(
    config: dict[str, Any],
    lamp_task: str,
    prepared: dict[str, Any],
    embedded: dict[str, Any],
    refitted: dict[str, Any] | None = None,
) -> Piece:
    """`anchors.parquet`: role, user_id, items, cluster (-1 noise), x, y, order.

    order: null for who is no anchor alone. The value names the anchors in order, with their
    members, and counts whole clusters among them, clusters, noise and candidates. `refitted`: the
    clusters of the stage `refit`, where `anchors.refits` asks for it.
    """
    options = RunConfig.model_validate(config)
    where = store()
    chosen = options.anchors
    key = digest(
        {
            "version": VERSION,
            "libraries": library_versions(("hdbscan", "scikit-learn", "numpy", "polars")),
            "embeddings": embedded["ref"]["sha256"],
            "users": [prepared["value"]["sha256"][role] for role in ("anchor", "few_shot")],
            "anchors": chosen.model_dump(exclude={"per_job"}),
            "refitted": refitted["ref"]["sha256"] if refitted else None,
            "seed": options.seed,
        }
    )

    def make(out: Path) -> dict[str, Any]:
        import polars as pl

        vectors = read_embeddings(where, embedded["ref"], options)
        ids, points = vectors["anchor"]
        sizes = {
            user["user_id"]: len(user["profile"]) for user in each_user(where, prepared, "anchor")
        }
        items = [sizes[user_id] for user_id in ids]
        labels = (
            refitted["value"]["clusters"]
            if refitted
            else clusters_of(points, chosen, derive_seed(options.seed, "cluster"))
        )
        members = members_of(ids, items, labels, chosen)
        if not members:
            raise InputError(f"{lamp_task}: {_no_anchor(items, chosen)}")
        place = {name: number for number, name in enumerate(members)}
        few_ids, few_points = vectors["few_shot"]
        flat = _plane(points, few_points)
        pl.DataFrame(
            {
                "role": ["anchor"] * len(ids) + ["few_shot"] * len(few_ids),
                "user_id": ids + few_ids,
                "items": items + [None] * len(few_ids),
                "cluster": [*labels, *([None] * len(few_ids))],
                "x": flat[:, 0],
                "y": flat[:, 1],
                "order": [place.get(user_id) for user_id in ids] + [None] * len(few_ids),
            }
        ).write_parquet(out / "anchors.parquet")
        by_id = dict(zip(ids, labels, strict=True))
        return {
            "anchors": [
                {
                    "user_id": name,
                    "items": sum(sizes[member] for member in own),
                    "cluster": by_id[own[0]],
                    "members": own,
                }
                for name, own in members.items()
            ],
            "whole_clusters": len(members.keys() - by_id.keys()),
            "asked": chosen.count,
            "candidates": len(ids),
            "eligible": sum(count >= chosen.min_items for count in items),
            "clusters": len(set(labels) - {-1}),
            "noise": labels.count(-1),
        }

    piece = where.get("anchors", key, make)
    log(
        f"{lamp_task}: {described(piece.value, chosen.min_items)}",
        warning=0 < single_users(piece.value) < piece.value["asked"],
    )
    return piece


def single_users(value: dict[str, Any]) -> int:
    """How many of the anchors are no whole clusters, by the value of an `anchors` result."""
    return len(value["anchors"]) - int(value["whole_clusters"])


def described(value: dict[str, Any], min_items: int) -> str:
    """What was chosen of whom, in one line: by the value of an `anchors` result."""
    whole = value["whole_clusters"]
    kinds = [f"{whole} whole clusters"] if whole else []
    among = f"{value['candidates']} candidates"
    if alone := single_users(value):
        kinds.append(f"{alone} users of {value['asked']} asked")
        among += f" ({value['eligible']} with {min_items} items or more)"
    return (
        f"anchors: {' and '.join(kinds)}, from {among} in {value['clusters']} clusters, "
        f"{value['noise']} noise"
    )


def _no_anchor(items: list[int], options: AnchorOptions) -> str:
    """Why there is no anchor, and what helps."""
    enough = sum(count >= options.min_items for count in items)
    if enough:
        return (
            f"no anchor: the {enough} candidates with anchors.min_items {options.min_items} items "
            "or more are all noise, which anchors.noise never leaves out; use noise last, or a "
            "smaller anchors.min_cluster_size"
        )
    return (
        f"no anchor: none of {len(items)} candidates has anchors.min_items {options.min_items} "
        f"items or more, the longest history has {max(items)}; lower it or give longer histories"
    )


# What `clusters_of` gave, by what it was given.
_CLUSTERS: dict[str, list[int]] = {}


def clusters_of(points: np.ndarray, options: AnchorOptions, seed: int) -> list[int]:
    """As `cluster`, once per process.

    The candidates are the same whatever number of items the few-shot users have, and `refit` asks
    for their clusters before it can tell that it was all done before.
    """
    given = hashlib.sha256(points.tobytes()).hexdigest()
    key = digest([given, list(points.shape), options.model_dump(), seed])
    if key not in _CLUSTERS:
        _CLUSTERS[key] = cluster(points, options, seed)
    return list(_CLUSTERS[key])


def cluster(points: np.ndarray, options: AnchorOptions, seed: int) -> list[int]:
    """Cluster number of each unit vector in `points` [U, D]; -1 is noise (HDBSCAN only).

    HDBSCAN runs on the first principal components, scaled to unit length: in hundreds of
    dimensions all distances look alike, and length is only how decided a user is. `reassign` goes
    on from its clusters with k-means (Lloyd 1982) until nobody moves: everybody, noise too, is with
    the nearest centre then.
    """
    import numpy as np
    from sklearn.decomposition import PCA

    if options.clustering == "kmeans":
        from sklearn.cluster import KMeans

        count = min(options.count, len(points))
        return KMeans(count, n_init=10, random_state=seed).fit_predict(points).tolist()
    if len(points) < 2 * options.min_cluster_size:
        # Too few for two clusters: one density estimate over all of them would call all noise.
        return [0] * len(points)
    import hdbscan

    dimensions = min(options.pca_dimensions, *points.shape)
    reduced = PCA(dimensions, svd_solver="full").fit_transform(points)
    reduced /= np.maximum(np.linalg.norm(reduced, axis=1, keepdims=True), 1e-12)
    model = hdbscan.HDBSCAN(
        min_cluster_size=options.min_cluster_size,
        min_samples=options.min_samples,
        cluster_selection_method=options.selection,
    )
    labels = model.fit_predict(reduced)
    if options.reassign and labels.max() >= 0:
        from sklearn.cluster import KMeans

        centres = np.stack([reduced[labels == k].mean(axis=0) for k in range(labels.max() + 1)])
        labels = KMeans(len(centres), init=centres, n_init=1, tol=0.0).fit_predict(reduced)
    return labels.tolist()


def choose(
    ids: list[str], items: list[int], labels: list[int], options: AnchorOptions
) -> list[str]:
    """Anchor ids in order of choice, at most `options.count` (the rule stands above)."""
    groups: dict[int, list[tuple[int, str]]] = {}
    sizes: dict[int, int] = {}
    for user_id, count, label in zip(ids, items, labels, strict=True):
        sizes[label] = sizes.get(label, 0) + 1
        if count >= options.min_items:
            groups.setdefault(label, []).append((-count, user_id))
    noise = [user_id for _, user_id in sorted(groups.pop(-1, []))]
    clusters = [
        [user_id for _, user_id in sorted(groups[label])]
        for label in sorted(groups, key=lambda label: (-sizes[label], label))
    ]
    if options.clustering == "kmeans":
        clusters = [members[:1] for members in clusters]
    rounds = max((len(members) for members in clusters), default=0)
    order = [members[turn] for turn in range(rounds) for members in clusters if turn < len(members)]
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
    members: dict[str, list[str]] = {}
    for label in sorted(set(labels) - {-1}):
        own = [user_id for user_id, other in zip(ids, labels, strict=True) if other == label]
        members[f"cluster-{label}"] = own
    return members


def _plane(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Candidates and few-shot users on the candidates' first two principal components [U, 2]."""
    import numpy as np
    from sklearn.decomposition import PCA

    if min(points.shape) < 2:
        return np.zeros((len(points) + len(others), 2))
    plane = PCA(2, svd_solver="full").fit(points)
    return np.concatenate([plane.transform(points), plane.transform(others)])

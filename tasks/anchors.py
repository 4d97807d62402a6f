"""Stage 4: clusters of the anchor candidates, and the anchors chosen from them."""

from collections.abc import Sequence

import polars as pl

from tasks.config.options import AnchorOptions
from tasks.embed import read_embeddings
from tasks.errors import InputError
from tasks.log import log
from tasks.method import clusters as rule
from tasks.record import File, derive_seed
from tasks.results.models import Anchor, Anchors, Clusters, Embedded
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.users import each_user

TABLE = "anchors.parquet"


def chosen_anchors(
    options: AnchorOptions, embedded: Embedded, candidates: File, seed: int
) -> Anchors:
    """The anchors. Logs how they were chosen."""
    chosen = anchors(options, embedded, candidates, clusters(options, embedded, seed))
    few = 0 < chosen.single_users < chosen.asked
    log(described(chosen, options.min_items), warning=few)
    return chosen


@stage(version=2, libraries=("hdbscan", "scikit-learn", "numpy"))
def clusters(options: AnchorOptions, embedded: Embedded, seed: int) -> Clusters:
    """The cluster of each anchor candidate, by its embedding."""
    points = read_embeddings(embedded)["anchor"][1]
    return Clusters(clusters=tuple(rule.cluster(points, options, derive_seed(seed, "cluster"))))


@stage(version=7, libraries=("scikit-learn", "numpy", "polars"))
def anchors(
    options: AnchorOptions, embedded: Embedded, candidates: File, clusters: Clusters
) -> Anchors:
    """The anchors in order of choice, with their members.

    candidates: the table of anchor candidates. Raises InputError where nobody can be an anchor.
    """
    vectors = read_embeddings(embedded)
    (ids, points), (few_ids, few_points) = vectors["anchor"], vectors["few_shot"]
    sizes = {user["user_id"]: len(user["profile"]) for user in each_user(candidates)}
    items, labels = [sizes[user_id] for user_id in ids], list(clusters.clusters)
    members = rule.members_of(ids, items, labels, options)
    if not members:
        raise InputError(_no_anchor(items, options))
    order = {name: number for number, name in enumerate(members)}
    plane, nothing = rule.plane(points, few_points), [None] * len(few_ids)
    columns = {
        "role": ["anchor"] * len(ids) + ["few_shot"] * len(few_ids),
        "user_id": ids + few_ids,
        "items": items + nothing,
        "cluster": labels + nothing,
        "x": plane[:, 0],
        "y": plane[:, 1],
        "order": [order.get(user_id) for user_id in ids] + nothing,
    }
    with store().new("anchors") as folder:
        pl.DataFrame(columns).write_parquet(folder.path / TABLE)
    label = dict(zip(ids, labels, strict=True))
    return Anchors(
        table=folder.file(TABLE),
        anchors=tuple(
            Anchor(
                name=name,
                items=sum(sizes[user_id] for user_id in users),
                cluster=label[users[0]],
                members=tuple(users),
            )
            for name, users in members.items()
        ),
        whole_clusters=len(members.keys() - sizes.keys()),
        asked=options.count,
        candidates=len(ids),
        eligible=sum(count >= options.min_items for count in items),
        clusters=len(set(labels) - {-1}),
        noise=labels.count(-1),
    )


def described(chosen: Anchors, min_items: int) -> str:
    """One line: which anchors were chosen, and from which candidates."""
    kinds = [f"{chosen.whole_clusters} whole clusters"] if chosen.whole_clusters else []
    among = f"{chosen.candidates} candidates"
    if alone := chosen.single_users:
        kinds.append(f"{alone} users of {chosen.asked} asked")
        among += f" ({chosen.eligible} with {min_items} items or more)"
    return (
        f"anchors: {' and '.join(kinds)}, from {among} in {chosen.clusters} clusters, "
        f"{chosen.noise} noise"
    )


def _no_anchor(items: Sequence[int], options: AnchorOptions) -> str:
    """Why there is no anchor, and what helps."""
    if enough := sum(count >= options.min_items for count in items):
        return (
            f"no anchor: the {enough} candidates with anchors.min_items {options.min_items} items "
            "or more are all noise, and anchors.noise=never excludes noise; set "
            "anchors.noise=last, or a smaller anchors.min_cluster_size"
        )
    return (
        f"no anchor: none of {len(items)} candidates has anchors.min_items {options.min_items} "
        f"items or more, the longest history has {max(items)}; lower it or give longer histories"
    )

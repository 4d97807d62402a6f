"""Who will be an anchor: an assumption, as nobody is clustered for a plan.

Anchors are the longest histories of clusters. Without clusters, candidates are dealt at random into
as many equal parts as anchors are asked for, and the longest history of each part is taken. Where
as many are asked for as there are, this is what the run does.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from tasks.config import RunConfig, derive_seed


def assumed_anchors(options: RunConfig, items: Mapping[str, int]) -> tuple[list[list[str]], str]:
    """Each anchor's members, in order, of candidates by their number of items; and what is assumed.

    With whole clusters (`anchors.train_on`) all candidates are assumed to be in one.
    """
    anchors = options.anchors
    generator = random.Random(derive_seed(options.seed, "plan", "anchors"))
    names = sorted(items)
    if anchors.clustering != "kmeans":
        # Those with too few items are out beforehand; among k-means' own they may be a cluster.
        names = [name for name in names if items[name] >= anchors.min_items]
    generator.shuffle(names)
    count = min(anchors.count, len(names))
    parts = [names[number::count] for number in range(count)]
    longest = [max(part, key=lambda name: (items[name], name)) for part in parts]
    users = [[name] for name in longest if items[name] >= anchors.min_items]
    note = f"{len(users)} anchors: the longest histories of {count} parts of the candidates"
    if anchors.train_on == "user":
        return users, note
    clusters = assumed_clusters(options, items)
    if anchors.train_on == "cluster":
        return clusters, f"{len(clusters)} clusters of all candidates"
    return clusters + users, f"{note}, and {len(clusters)} clusters of all candidates"


def assumed_clusters(options: RunConfig, candidates: Iterable[str]) -> list[list[str]]:
    """As many clusters as the root of half the number of candidates, dealt at random."""
    names = sorted(candidates)
    random.Random(derive_seed(options.seed, "plan", "clusters")).shuffle(names)
    number = max(1, round((len(names) / 2) ** 0.5))
    return [sorted(names[start::number]) for start in range(number)]

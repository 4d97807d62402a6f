"""Which users are one author.

LaMP's "users" can be sliding windows over one author's items; then a test user's query stands in a
neighbour's profile. So users that share content form a group.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from tasks.lamp.content import told
from tasks.lamp.definitions import LampTask

# They bound the search for shared content (`_sharing_pairs`); neither changes what it finds.
PREFIX_MATCHES = 4
JOINED_ROWS = 5_000_000


def find_groups(users: pl.DataFrame, share: float, task: LampTask) -> pl.Series:
    """Group ids (string, one per row of `users`): the smallest user_id, as text, of the group.

    Two users are one group when they share at least `share` (0..1] of the distinct (text, answer)
    pairs of the smaller profile, or have the same user_id; and so on through third users. Texts are
    one if they are about the same (`content.told`).
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components  # not above: scipy takes long

    items = users.select("profile").with_row_index("row").explode("profile").drop_nulls()
    # Numbers for texts and answers, so that what follows is light; ordered as they are.
    numbers = {name: text.rank("dense") for name, text in told("profile", task).items()}
    items = items.select("row", **numbers).unique()
    # An exact integer per pair instead of its hash: joins are as fast and nothing can collide.
    items = items.select(
        "row",
        pair=pl.struct("about", "answer").rank("dense"),
        users=pl.len().over("about", "answer"),
        size=pl.len().over("row"),
    )
    # The rarest pair of a row comes first; ties by the pair's number.
    rarity = pl.struct("users", "pair").rank("ordinal").over("row")
    items = items.with_columns(order=rarity.cast(pl.Int64) - 1)
    shared = _sharing_pairs(items, share)
    ids = users.select("user_id").with_row_index("row")
    first = ids.select(row_other=pl.first("row").over("user_id"))
    left = np.concatenate([shared["row"], ids["row"]])
    right = np.concatenate([shared["row_other"], first["row_other"]])
    edges = coo_array((np.ones(len(left)), (left, right)), (ids.height, ids.height))
    _, components = connected_components(edges, directed=False)
    ids = ids.with_columns(component=pl.Series(components))
    return ids.select(group=pl.col("user_id").min().over("component"))["group"]


def _sharing_pairs(items: pl.DataFrame, share: float) -> pl.DataFrame:
    """Rows `row`, `row_other` of users who share at least `share` of the smaller profile.

    items: row, pair, users (who have this pair), size (of the profile), order (0 = rarest).
    """
    # If a profile of n items shares t of them with another one, any n - t + c of its items hold
    # at least c of those. So only its n - t + c rarest items look for partners with c matches,
    # and an item that everybody has does not pair everybody with everybody.
    wanted = (pl.col("size") * share - 1e-9).ceil().clip(lower_bound=1)
    matches = wanted.clip(upper_bound=PREFIX_MATCHES)
    rare = items.filter(pl.col("order") < pl.col("size") - wanted + matches)
    # Joined in batches of whole users, so that memory stays bounded however much is shared.
    rare = rare.sort("row").with_columns(
        batch=(pl.col("users").cum_sum() // JOINED_ROWS).min().over("row")
    )
    smaller = (pl.col("size") < pl.col("size_other")) | (
        (pl.col("size") == pl.col("size_other")) & (pl.col("row") < pl.col("row_other"))
    )
    found = []
    for batch in rare.partition_by("batch"):
        candidates = (
            batch.join(items, on="pair", suffix="_other")
            .filter(smaller)
            .group_by("row", "row_other", "size")
            .agg(matched=pl.len())
            .filter(pl.col("matched") >= matches)
        )
        found.append(
            candidates.join(items.select("row", "pair"), on="row")
            .join(items.select(row_other="row", pair="pair"), on=["row_other", "pair"])
            .group_by("row", "row_other", "size")
            .agg(shared=pl.len())
            .filter(pl.col("shared") >= wanted)
            .select("row", "row_other")
        )
    return pl.concat(found) if found else items.select("row", row_other="row").clear()

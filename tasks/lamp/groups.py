"""Which users are one author.

LaMP's "users" can be sliding windows over one author's items; then a test user's query stands in a
neighbour's profile. So users that share content form a group.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tasks.lamp.content import about_and_answer
from tasks.lamp.definitions import LampTask

# They bound the search for shared content (`_sharing`); neither changes what it finds.
PREFIX_MATCHES = 4
JOINED_ROWS = 5_000_000


def find_groups(users: pl.DataFrame, share: float, task: LampTask) -> pl.Series:
    """Group ids (string, one per row of `users`): the smallest user_id, as text, of the group.

    Two users are one group when they share at least `share` (0..1] of the distinct (text, answer)
    pairs of the smaller profile, or have the same user_id; and so on through third users. Texts are
    one if they are about the same (`content.about_and_answer`).
    """
    from scipy.sparse import coo_array  # here: scipy takes long
    from scipy.sparse.csgraph import connected_components

    items = users.select("profile").with_row_index("row").explode("profile").drop_nulls()
    # Numbers for texts and answers, so that what follows is light; ordered as they are.
    numbers = {name: text.rank("dense") for name, text in about_and_answer("profile", task).items()}
    items = items.select("row", **numbers).unique()
    # An exact integer per pair instead of its hash: nothing can collide.
    items = items.select(
        "row",
        pair=pl.struct("about", "answer").rank("dense"),
        users=pl.len().over("about", "answer"),
    )
    ids = users.select("user_id").with_row_index("row")
    first = ids.select(pl.first("row").over("user_id"))["row"]
    edges = [np.stack([ids["row"], first]), *_sharing(items, users.height, share)]
    left, right = np.concatenate(edges, axis=1)
    graph = coo_array((np.ones(len(left)), (left, right)), (ids.height, ids.height))
    _, components = connected_components(graph, directed=False)
    ids = ids.with_columns(component=pl.Series(components))
    return ids.select(group=pl.col("user_id").min().over("component"))["group"]


def _sharing(items: pl.DataFrame, height: int, share: float) -> Iterator[NDArray[np.integer[Any]]]:
    """Rows [2, n] of users who share at least `share` of the smaller profile, batch by batch.

    items: row (of `height` users), pair, users (who have this pair).
    """
    from scipy.sparse import csr_array

    items = items.sort("row", "users", "pair")  # the rarest pair of a row comes first
    row, pair, holders = (items[name].to_numpy() for name in ("row", "pair", "users"))
    sizes = np.bincount(row, minlength=height)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    wanted = np.maximum(np.ceil(sizes * share - 1e-9), 1)
    matches = np.minimum(wanted, PREFIX_MATCHES)
    # If a profile of n items shares t of them with another one, any n - t + c of its items hold
    # at least c of those. So only its n - t + c rarest items look for partners with c matches,
    # and an item that everybody has does not pair everybody with everybody.
    rare = np.arange(len(row)) - ends[row] < (sizes - wanted + matches)[row]
    shape = (height, int(pair.max(initial=0)) + 1)
    whole = csr_array((np.ones(len(row), np.int32), pair, ends), shape)
    prefix = csr_array((rare.astype(np.int32), pair, ends), shape, copy=True)
    prefix.eliminate_zeros()
    by_pair = whole.T.tocsr()
    # In batches of whole users, so that memory stays bounded however much is shared.
    met = np.concatenate([[0], np.cumsum(holders * rare)])[ends[:-1]]
    starts = np.unique(met // JOINED_ROWS, return_index=True)[1]
    for start, end in zip(starts, [*starts, height][1:], strict=True):
        common = (prefix[start:end] @ by_pair).tocoo()
        one, other = common.row + start, common.col
        smaller = (sizes[one] < sizes[other]) | ((sizes[one] == sizes[other]) & (one < other))
        near = smaller & (common.data >= matches[one])
        pairs = np.stack([one[near], other[near]])
        # Each pair costs a copy of the larger profile.
        parts = np.diff(np.cumsum(sizes[pairs[1]]) // JOINED_ROWS)
        for one, other in np.split(pairs, np.flatnonzero(parts) + 1, axis=1):
            shared = whole[one].multiply(whole[other]).sum(axis=1)
            yield np.stack([one, other])[:, shared >= wanted[one]]

"""Whitening: which directions of a signature tell users apart, and which only say what was asked.

A user's signature is a mean over the user's items, and most of what an item's gradient says is of
the item: another item of the same user points elsewhere. So vectors are scaled down where the items
of one user differ among themselves. With the covariance of gradients for a metric this is a Fisher
kernel (Jaakkola & Haussler 1998), here with the covariance within users alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Added to each variance, as a share of the largest: directions that no item took stay bounded.
FLOOR = 0.01


def whitening(users: Iterable[np.ndarray]) -> np.ndarray:
    """[D, D] float32 W such that v W has within-user variances of 1, or less where there is little.

    users: the item vectors [N, D] of each. Without any two items of one user, W is the identity.
    """
    import numpy as np
    from threadpoolctl import threadpool_limits

    scatter, freedom = None, 0
    for items in users:
        own = items.astype(np.float64)
        own -= own.mean(0)
        # One thread, here and below: Ray gives its workers another number of them than a shell,
        # and how many there are moves the last bits.
        with threadpool_limits(1):
            part = own.T @ own
        scatter = part if scatter is None else scatter + part
        freedom += len(own) - 1
    if scatter is None:
        raise ValueError("no users to whiten by")
    with threadpool_limits(1):
        variances, directions = np.linalg.eigh(scatter / max(freedom, 1))
    largest = variances[-1]
    if freedom < 1 or largest <= 0.0:
        return np.eye(len(scatter), dtype=np.float32)
    scales = np.maximum(variances, 0.0) + FLOOR * largest
    return (directions / np.sqrt(scales)).astype(np.float32)


def unit_rows(
    vectors: np.ndarray, centre: np.ndarray | None = None, matrix: np.ndarray | None = None
) -> np.ndarray:
    """Vectors [U, D] less the centre [D], times the matrix [D, D], each of length 1."""
    import numpy as np

    if not len(vectors):
        return vectors
    found = vectors if centre is None else vectors - centre
    if matrix is not None:
        found = found @ matrix
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)

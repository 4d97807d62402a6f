"""Whitening: which directions of a signature tell users apart, and which only say what was asked.

A user's signature is a mean over the user's items, and most of what an item's gradient says is of
the item: another item of the same user points elsewhere. So vectors are scaled down where the items
of one user differ among themselves. With the covariance of gradients for a metric this is a Fisher
kernel (Jaakkola & Haussler 1998), here with the covariance within users alone:

    S = sum_u sum_i (x_ui - mean_u) (x_ui - mean_u)^T / (N - U) = V diag(s) V^T
    W = V diag(s + FLOOR max(s))^(-1/2)
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

# Added to each variance, as a share of the largest: directions that no item took stay bounded.
FLOOR = 0.01


def whitening(users: Iterable[NDArray[np.floating]]) -> NDArray[np.float32]:
    """[D, D] W such that v W has within-user variances of 1, or less where there is little.

    users: the item vectors [N, D] of each. Without any two items of one user, W is the identity.
    """
    scatter, freedom = np.zeros(()), 0
    for items in users:
        own = items.astype(np.float64)
        own -= own.mean(0)
        # One thread, here and below: Ray gives its workers another number of them than a shell,
        # and how many there are moves the last bits.
        with threadpool_limits(1):
            scatter = scatter + own.T @ own
        freedom += len(own) - 1
    if not scatter.ndim:
        raise ValueError("no users to whiten by")
    with threadpool_limits(1):
        variances, directions = np.linalg.eigh(scatter / max(freedom, 1))
    largest = variances[-1]
    if freedom < 1 or largest <= 0.0:
        return np.eye(len(scatter), dtype=np.float32)
    scales = np.maximum(variances, 0.0) + FLOOR * largest
    return np.asarray(directions / np.sqrt(scales), np.float32)


def placed(
    vectors: NDArray[np.floating],
    centre: NDArray[np.floating] | None = None,
    matrix: NDArray[np.floating] | None = None,
) -> NDArray[np.floating]:
    """Vectors [U, D] less the centre [D], times the matrix [D, D]."""
    found = vectors if centre is None else vectors - centre
    return found if matrix is None else found @ matrix


def unit_rows(vectors: NDArray[np.floating]) -> NDArray[np.floating]:
    """Vectors [U, D], each of length 1."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12))

"""Whitening: which directions of a signature tell users apart, and which only say what was asked.

A user's signature is a mean over the user's items. Most of what an item's gradient says is about
the item, not the user: another item of the same user points elsewhere. So directions are scaled
down in which one user's items differ. A Fisher kernel (Jaakkola & Haussler 1998) does so with the
covariance of all gradients; this takes the covariance within users alone:

    S = sum_u sum_i (x_ui - mean_u) (x_ui - mean_u)^T / (N - U) = V diag(s) V^T
    W = V diag(s + FLOOR max(s))^(-1/2)
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

# Added to each variance, as a share of the largest: it bounds directions that no item took.
FLOOR = 0.01


def whitening(users: Iterable[NDArray[np.floating]]) -> NDArray[np.float32]:
    """W [D, D]: within users v W has variance 1, or less in directions of little variance.

    users: the item vectors [N, D] of each. If no user has two items, W is the identity.
    """
    scatter, freedom = np.zeros(()), 0
    for items in users:
        centred = items.astype(np.float64)
        centred -= centred.mean(0)
        # One thread, here and below: the number of threads moves the last bits, and Ray's workers
        # have another number than a shell.
        with threadpool_limits(1):
            scatter = scatter + centred.T @ centred
        freedom += len(centred) - 1
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
    centred = vectors if centre is None else vectors - centre
    return centred if matrix is None else centred @ matrix


def unit_rows(vectors: NDArray[np.floating]) -> NDArray[np.floating]:
    """Vectors [U, D], each of length 1."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12))

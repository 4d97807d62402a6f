"""Whitening: which directions of a signature tell users apart, and which only say what was asked.

A user's signature is a mean over the user's items, and most of what an item's gradient says is of
the item: another item of the same user points elsewhere. So vectors are scaled down where the items
of one user differ among themselves. With the covariance of gradients for a metric this is a Fisher
kernel (Jaakkola & Haussler 1998), here with the covariance within users alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

WHITENING_FILE = "whitening.safetensors"
# So many users of the population teach it: their items are thousands.
WHITENED = 100
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


def write_whitening(path: Path, matrix: np.ndarray) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"whitening": np.ascontiguousarray(matrix)}, path)


def read_whitening(path: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    return load_file(path)["whitening"]

"""Where few-shot users and the bank's anchors stand: cosines between them are similarities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.config import RunConfig
from tasks.embedding import read_embeddings
from tasks.store.artifacts import Store

if TYPE_CHECKING:
    import numpy as np


def unit_vectors(
    options: RunConfig, where: Store, embedded: dict[str, Any], banked: dict[str, Any]
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(few-shot user ids, their unit vectors [U, D], the bank's [K, D] in its order).

    An anchor that was trained on several users stands in the middle of their unit vectors.
    """
    import numpy as np

    vectors = read_embeddings(where, embedded["ref"], options)
    ids, points = vectors["anchor"]
    row = {user_id: number for number, user_id in enumerate(ids)}
    groups = [[row[user] for user in users] for users in banked["value"]["users"].values()]
    bank = np.stack([points[group].mean(0) for group in groups])
    bank /= np.maximum(np.linalg.norm(bank, axis=1, keepdims=True), 1e-12)
    users, few_shot = vectors["few_shot"]
    return users, few_shot, bank

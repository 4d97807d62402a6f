"""How alike few-shot users and the bank's anchors are: cosines of their embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.artifacts import Store
from tasks.config import RunConfig
from tasks.embedding import read_embeddings

if TYPE_CHECKING:
    import numpy as np


def similarities(
    options: RunConfig, where: Store, embedded: dict[str, Any], banked: dict[str, Any]
) -> tuple[list[str], list[str], np.ndarray]:
    """(few-shot user ids, anchor ids, cosines [U, K]).

    An anchor that was trained on several users stands at the mean of their unit vectors.
    """
    import numpy as np

    vectors = read_embeddings(where, embedded["ref"], options)
    ids, points = vectors["anchor"]
    row = {user_id: number for number, user_id in enumerate(ids)}
    anchors = banked["value"]["ids"]
    groups = [[row[user] for user in banked["value"]["users"][anchor]] for anchor in anchors]
    bank = np.stack([points[group].mean(0) for group in groups])
    bank /= np.maximum(np.linalg.norm(bank, axis=1, keepdims=True), 1e-12)
    users, few_shot = vectors["few_shot"]
    # Six decimals: the last bit depends on how many users stand in the product, and a user whose
    # history did not change must keep the same recipe, or everything after it is done again.
    return users, anchors, np.round(few_shot @ bank.T, 6)

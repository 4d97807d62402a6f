"""Which anchors a user's LoRA is merged from, and with which weights (docs/method.md, Fusion).

U users, K anchors, m chosen anchors.
"""

from __future__ import annotations

import numpy as np

from tasks.config.options import FusionOptions

# Members (their numbers in the bank), their similarities, their weights, each [U, m].
Chosen = tuple[np.ndarray, np.ndarray, np.ndarray]
# Users whose similarities are in memory at once: at 50 anchors, 50 MB of float64 twice.
BLOCK = 65_536


def search(
    users: np.ndarray, bank: np.ndarray, options: FusionOptions, block: int = BLOCK
) -> Chosen:
    """`recipes` of users [U, D] by their cosines with the bank's members [K, D] (unit vectors).

    `block` users at a time, so that beside the result memory does not grow with U.
    """
    size = (len(users), min(options.top_m, len(bank)))
    chosen = np.empty(size, np.int64), np.empty(size), np.empty(size)
    for start in range(0, len(users), block):
        part = recipes(users[start : start + block] @ bank.T, options)
        for whole, piece in zip(chosen, part, strict=True):
            whole[start : start + block] = piece
    return chosen


def recipes(similarities: np.ndarray, options: FusionOptions) -> Chosen:
    """Each user's top `top_m` members by cosine [U, K], best first, and their weights (sum 1).

    Equal similarities go to the earlier member. `cosine`: w_i = s_i / sum(s), negative
    similarities counting as 0, equal weights where all are. `softmax`: w_i = exp(s_i /
    temperature) / sum. `order=published` hands the weights out in reverse, as the published script
    does (its merger weighs the first adapter by the second's), and its `cosine` leaves negative
    similarities as they are: where signs differ, weights lie outside 0 to 1 (or are NaN, sum 0).
    """
    count = similarities.shape[1]
    # Six decimals: the last bit depends on how many users stand in the product, and a user whose
    # history did not change must keep the same recipe, or everything after it is done again.
    # As whole numbers that also carry the member no two are equal, so there is one way to order
    # them, and the order alone says both.
    keys = np.rint(similarities * -1e6).astype(np.int64) * count + np.arange(count)
    # For the tens of anchors of a bank a whole sort is as fast as a partition.
    keys = np.sort(keys, axis=1)[:, : options.top_m]
    members, chosen = keys % count, -(keys // count) / 1e6
    if options.weights == "softmax":
        raw = np.exp((chosen - chosen[:, :1]) / options.temperature)
    elif as_published(options):
        raw = chosen
    else:
        raw = np.maximum(chosen, 0.0)
        raw[raw[:, 0] == 0.0] = 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = raw / raw.sum(axis=1, keepdims=True)
    if options.order == "published":
        weights = weights[:, ::-1]
    return members, chosen, weights


def as_published(options: FusionOptions) -> bool:
    """Whether negative similarities are shares, too, as in the published script."""
    return options.order == "published" and options.weights == "cosine"


def by_evidence(similarities: np.ndarray, evidence: np.ndarray, options: FusionOptions) -> Chosen:
    """Each user's `top_m` anchors by the evidence for them [U, K], best first; NaN is no evidence.

    w_i = exp(log p_i / temperature) / sum over the chosen (`evidence_temperature`): with 1 this is
    Bayesian model averaging under equal priors. Ties go to the earlier anchor. An anchor without
    evidence weighs nothing.
    """
    known = np.where(np.isnan(evidence), -np.inf, evidence)
    members = np.argsort(-known, axis=1, kind="stable")[:, : options.top_m]
    chosen = np.take_along_axis(known, members, axis=1)
    raw = np.exp((chosen - chosen[:, :1]) / options.evidence_temperature)
    weights = raw / raw.sum(axis=1, keepdims=True)
    return members, np.take_along_axis(np.round(similarities, 6), members, axis=1), weights


def shortlists(cosines: np.ndarray, size: int | None) -> np.ndarray:
    """[U, K], True for each user's `size` most similar anchors (all where it is None)."""
    if size is None or size >= cosines.shape[1]:
        return np.ones(cosines.shape, dtype=bool)
    chosen = np.zeros(cosines.shape, dtype=bool)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :size]
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen

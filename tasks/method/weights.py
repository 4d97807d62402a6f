"""Which anchors a user's LoRA is merged from, and with which weights (docs/method.md, Fusion).

U users, K anchors, m chosen anchors.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.config.options import FusionOptions

Floats = NDArray[np.floating]
# Members (their numbers in the bank), their similarities, their weights, each [U, m].
Chosen = tuple[NDArray[np.int64], Floats, Floats]
# Users whose similarities are in memory at once: at 50 anchors, 50 MB of float64 twice.
BLOCK = 65_536


def search(users: Floats, bank: Floats, options: FusionOptions, block: int = BLOCK) -> Chosen:
    """`recipes` of users [U, D] by their cosines with the bank's members [K, D] (unit vectors).

    `block` users at a time, so that only the result's memory grows with U.
    """
    size = (len(users), min(options.top_m, len(bank)))
    chosen = np.empty(size, np.int64), np.empty(size), np.empty(size)
    for start in range(0, len(users), block):
        part = recipes(users[start : start + block] @ bank.T, options)
        for whole, piece in zip(chosen, part, strict=True):
            whole[start : start + block] = piece
    return chosen


def recipes(similarities: Floats, options: FusionOptions) -> Chosen:
    """Each user's top `top_m` members by cosine [U, K], best first, and their weights (sum 1).

    Of equal similarities the earlier member comes first. `cosine`: w_i = s_i / sum(s); negative
    similarities count as 0, and if all do, weights are equal. `softmax`: w_i = exp(s_i /
    temperature) / sum. `order=published` hands the weights out in reverse, as the published script
    does (its merger weighs the first adapter by the second's weight). Its `cosine` keeps negative
    similarities: with both signs weights lie outside 0 to 1 (or are NaN, if the sum is 0).
    """
    count = similarities.shape[1]
    # Six decimals: the last bits depend on who else is in the product. A user whose history did not
    # change must keep the recipe, or everything after it is made again.
    # Whole numbers that also hold the member's number: no two are equal, so sorting gives both.
    keys = np.rint(similarities * -1e6).astype(np.int64) * count + np.arange(count)
    # With tens of anchors a full sort is as fast as a partition.
    keys = np.sort(keys, axis=1)[:, : options.top_m]
    members, chosen = keys % count, -(keys // count) / 1e6
    published = options.order == "published"
    if options.weights == "softmax":
        raw = np.exp((chosen - chosen[:, :1]) / options.temperature)
    elif published:
        raw = chosen
    else:
        raw = np.maximum(chosen, 0.0)
        raw[raw[:, 0] == 0.0] = 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = raw / raw.sum(axis=1, keepdims=True)
    return members, chosen, weights[:, ::-1] if published else weights


def by_evidence(similarities: Floats, evidence: Floats, options: FusionOptions) -> Chosen:
    """Each user's `top_m` anchors by the evidence for them [U, K], best first; NaN is no evidence.

    w_i = exp(log p_i / T) / sum over the chosen, T = `evidence_temperature`. With T = 1 this is
    Bayesian model averaging under equal priors. Of equal anchors the earlier comes first. An anchor
    without evidence has weight 0.
    """
    known = np.where(np.isnan(evidence), -np.inf, evidence)
    members = np.argsort(-known, axis=1, kind="stable")[:, : options.top_m]
    chosen = np.take_along_axis(known, members, axis=1)
    raw = np.exp((chosen - chosen[:, :1]) / options.evidence_temperature)
    weights = raw / raw.sum(axis=1, keepdims=True)
    return members, np.take_along_axis(np.round(similarities, 6), members, axis=1), weights


def vector_likelihoods(users: Floats, items: Sequence[int], anchors: Floats) -> Floats:
    """[U, K]: log p of the vectors of a user's items under each anchor, less a constant per user.

    users [U, d]: the mean x over the user's n vectors; items: n, per user. An anchor's items are
    taken as normal around its vector c (anchors [K, d]) with covariance I, as whitened vectors are
    within users. So log p = n (x . c - |c|^2 / 2) + constant. In four decimals, as the evidence.
    """
    per_item = users @ anchors.T - 0.5 * (anchors**2).sum(axis=1)
    likelihoods: Floats = np.round(np.asarray(items)[:, None] * per_item, 4)
    return likelihoods


def shortlists(cosines: Floats, size: int | None) -> NDArray[np.bool_]:
    """[U, K], True for each user's `size` most similar anchors (None: all).

    Cosines are rounded: their last bits depend on who else is in the product.
    """
    chosen = np.zeros(cosines.shape, dtype=bool)
    order = np.argsort(-np.round(cosines, 6), axis=1, kind="stable")[:, :size]
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen

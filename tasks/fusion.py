"""Stage 6: per user a recipe, the anchors a merged LoRA is made of and their weights.

A merged LoRA is computed from its recipe when it is needed and never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config import RunConfig
from tasks.errors import InputError, label
from tasks.evidence import read_evidence
from tasks.options import FusionOptions
from tasks.similarity import unit_vectors
from tasks.stage import log, stage, store
from tasks.store.artifacts import Store
from tasks.store.pieces import Piece, digest, library_versions

if TYPE_CHECKING:
    import numpy as np

    # Members (their numbers in the bank), their similarities, their weights, each [U, m].
    Recipes = tuple[np.ndarray, np.ndarray, np.ndarray]

VERSION = 3
# Users whose similarities are in memory at once: at 50 anchors, 50 MB of float64 twice.
BLOCK = 65_536


@stage(name="fusion")
def fusion(
    config: dict[str, Any],
    lamp_task: str,
    embedded: dict[str, Any],
    banked: dict[str, Any],
    weighed: dict[str, Any] | None,
) -> Piece:
    """`recipes.parquet`: user_id, anchors [m], similarities [m], weights [m], best anchor first.

    `weighed` is the `evidence` result where `fusion.weights` is `evidence`.
    """
    options = RunConfig.model_validate(config)
    where = store()
    members = banked["value"]["ids"]
    key = digest(
        {
            "version": VERSION,
            "libraries": library_versions(("numpy", "polars")),
            "embeddings": embedded["ref"]["sha256"],
            "members": banked["value"]["users"],
            "evidence": weighed["ref"]["sha256"] if weighed else None,
            "fusion": options.fusion.model_dump(exclude={"merge"}),
            # Negative similarities counted as nothing before.
            **({"published": 2} if _as_published(options.fusion) else {}),
        }
    )

    def make(out: Path) -> dict[str, Any]:
        import polars as pl

        users, few_shot, bank = unit_vectors(options, where, embedded, banked)
        if weighed:
            found = by_evidence(few_shot @ bank.T, read_evidence(where, weighed), options.fusion)
        else:
            found = search(few_shot, bank, options.fusion)
            _refuse_no_mixture(users, *found[1:])
        chosen, similarities, weights = found
        anchors = pl.Series(members).gather(chosen.ravel()).reshape(chosen.shape)
        pl.DataFrame(
            {
                "user_id": users,
                "anchors": anchors.arr.to_list(),
                "similarities": pl.Series(similarities).arr.to_list(),
                "weights": pl.Series(weights).arr.to_list(),
            }
        ).write_parquet(out / "recipes.parquet")
        return {
            "users": len(users),
            "anchors_per_user": chosen.shape[1],
            "without_similar_anchor": int((similarities.max(axis=1) <= 0).sum()),
        }

    piece = where.get("fusion", key, make)
    equal = options.fusion.weights == "cosine" and options.fusion.order == "right"
    lost = piece.value["without_similar_anchor"] if equal else 0
    log(
        f"{lamp_task}: recipes of {piece.value['users']} users from "
        f"{piece.value['anchors_per_user']} anchors each"
        + (f"; {lost} users are like no anchor (cosine <= 0) and get equal weights" if lost else "")
    )
    return piece


def search(
    users: np.ndarray, bank: np.ndarray, options: FusionOptions, block: int = BLOCK
) -> Recipes:
    """`recipes` of users [U, D] by their cosines with the bank's members [K, D] (unit vectors).

    `block` users at a time, so that beside the result memory does not grow with U.
    """
    import numpy as np

    size = (len(users), min(options.top_m, len(bank)))
    chosen = np.empty(size, np.int64), np.empty(size), np.empty(size)
    for start in range(0, len(users), block):
        part = recipes(users[start : start + block] @ bank.T, options)
        for whole, piece in zip(chosen, part, strict=True):
            whole[start : start + block] = piece
    return chosen


def recipes(similarities: np.ndarray, options: FusionOptions) -> Recipes:
    """Each user's top `top_m` members by cosine [U, K], best first, and their weights (sum 1).

    Equal similarities go to the earlier member. `cosine`: w_i = s_i / sum(s), negative
    similarities counting as 0, equal weights where all are. `softmax`: w_i = exp(s_i /
    temperature) / sum. `order=published` hands the weights out in reverse, as the published script
    does (its merger weighs the first adapter by the second's), and its `cosine` leaves negative
    similarities as they are: where signs differ, weights lie outside 0 to 1 (or are NaN, sum 0).
    """
    import numpy as np

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
    elif _as_published(options):
        raw = chosen
    else:
        raw = np.maximum(chosen, 0.0)
        raw[raw[:, 0] == 0.0] = 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = raw / raw.sum(axis=1, keepdims=True)
    if options.order == "published":
        weights = weights[:, ::-1]
    return members, chosen, weights


def _as_published(options: FusionOptions) -> bool:
    """Whether negative similarities are shares, too, as in the published script."""
    return options.order == "published" and options.weights == "cosine"


def _refuse_no_mixture(users: Sequence[str], similarities: np.ndarray, weights: np.ndarray) -> None:
    """Raises InputError for a user with a weight outside 0 to 1, as the published merger does."""
    import numpy as np

    wrong = np.flatnonzero(~((weights >= 0) & (weights <= 1)).all(axis=1))
    if len(wrong):
        own = ", ".join(f"{one:g}" for one in similarities[wrong[0]])
        raise InputError(
            f"fusion.order published: user {label(users[wrong[0]])} has the similarities {own}, "
            f"whose shares are no weights from 0 to 1 (so have {len(wrong)} of {len(users)} "
            "users), and the published merger raises there, too; use order=right or "
            "weights=softmax, or leave out the method mta_published, which has this order"
        )


def by_evidence(similarities: np.ndarray, evidence: np.ndarray, options: FusionOptions) -> Recipes:
    """Each user's `top_m` anchors by the evidence for them [U, K], best first; NaN is no evidence.

    w_i = exp(log p_i / temperature) / sum over the chosen (`evidence_temperature`): with 1 this is
    Bayesian model averaging under equal priors. Ties go to the earlier anchor. An anchor without
    evidence weighs nothing.
    """
    import numpy as np

    known = np.where(np.isnan(evidence), -np.inf, evidence)
    members = np.argsort(-known, axis=1, kind="stable")[:, : options.top_m]
    chosen = np.take_along_axis(known, members, axis=1)
    raw = np.exp((chosen - chosen[:, :1]) / options.evidence_temperature)
    weights = raw / raw.sum(axis=1, keepdims=True)
    return members, np.take_along_axis(np.round(similarities, 6), members, axis=1), weights


def read_recipes(where: Store, fused: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """user_id -> {anchors, similarities, weights} of a `fusion` result."""
    import polars as pl

    table = pl.read_parquet(where.open(fused["ref"]).folder / "recipes.parquet")
    return {row.pop("user_id"): row for row in table.to_dicts()}

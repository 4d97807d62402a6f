"""Stage 6: per user a recipe, the anchors a merged LoRA is made of and their weights.

A merged LoRA is computed from its recipe when it is needed and never stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.artifacts import Piece, Store, digest, library_versions
from tasks.config import FusionOptions, RunConfig
from tasks.embedding import read_embeddings
from tasks.stage import log, stage, store

if TYPE_CHECKING:
    import numpy as np

    # Members (their numbers in the bank), their similarities, their weights, each [U, m].
    Recipes = tuple[np.ndarray, np.ndarray, np.ndarray]

VERSION = 2
# Users whose similarities are in memory at once: at 50 anchors, 50 MB of float64 twice.
BLOCK = 65_536


@stage(name="fusion")
def fusion(
    config: dict[str, Any], lamp_task: str, embedded: dict[str, Any], banked: dict[str, Any]
) -> Piece:
    """`recipes.parquet`: user_id, anchors [m], similarities [m], weights [m], best anchor first."""
    options = RunConfig.model_validate(config)
    where = store()
    members = banked["value"]["ids"]
    key = digest(
        {
            "version": VERSION,
            "libraries": library_versions(("numpy", "polars")),
            "embeddings": embedded["ref"]["sha256"],
            "members": members,
            "fusion": options.fusion.model_dump(exclude={"merge"}),
        }
    )

    def make(out: Path) -> dict[str, Any]:
        import polars as pl

        vectors = read_embeddings(where, embedded["ref"], options)
        ids, points = vectors["anchor"]
        row = {user_id: number for number, user_id in enumerate(ids)}
        bank = points[[row[member] for member in members]]
        users, few_shot = vectors["few_shot"]
        chosen, similarities, weights = search(few_shot, bank, options.fusion)
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
            "without_similar_anchor": int((similarities[:, 0] <= 0).sum()),
        }

    piece = where.get("fusion", key, make)
    lost = piece.value["without_similar_anchor"]
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
    does (its merger weighs the first adapter by the second's).
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
    else:
        raw = np.maximum(chosen, 0.0)
        raw[raw[:, 0] == 0.0] = 1.0
    weights = raw / raw.sum(axis=1, keepdims=True)
    if options.order == "published":
        weights = weights[:, ::-1]
    return members, chosen, weights


def read_recipes(where: Store, fused: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """user_id -> {anchors, similarities, weights} of a `fusion` result."""
    import polars as pl

    table = pl.read_parquet(where.open(fused["ref"]).folder / "recipes.parquet")
    return {row.pop("user_id"): row for row in table.to_dicts()}

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

VERSION = 1


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
        table = [
            {"user_id": user, **recipe(similarities, members, options.fusion)}
            for user, similarities in zip(users, few_shot @ bank.T, strict=True)
        ]
        pl.DataFrame(table).write_parquet(out / "recipes.parquet")
        return {
            "users": len(users),
            "anchors_per_user": min(options.fusion.top_m, len(members)),
            "without_similar_anchor": sum(max(item["similarities"]) <= 0 for item in table),
        }

    piece = where.get("fusion", key, make)
    lost = piece.value["without_similar_anchor"]
    log(
        f"{lamp_task}: recipes of {piece.value['users']} users from "
        f"{piece.value['anchors_per_user']} anchors each"
        + (f"; {lost} users are like no anchor (cosine <= 0) and get equal weights" if lost else "")
    )
    return piece


def recipe(similarities: np.ndarray, members: list[str], options: FusionOptions) -> dict[str, Any]:
    """The top `top_m` members by cosine similarity [K], and their weights (sum 1).

    `cosine`: w_i = s_i / sum(s), negative similarities counting as 0, equal weights where all
    are. `softmax`: w_i = exp(s_i / temperature) / sum. `order=published` hands the weights out in
    reverse, as the published script does (its merger weighs the first adapter by the second's).
    """
    import numpy as np

    # Six decimals: the last bit depends on how many users stand in the product, and a user whose
    # history did not change must keep the same recipe, or everything after it is done again.
    similarities = np.round(similarities, 6)
    top = np.argsort(-similarities, kind="stable")[: options.top_m]
    chosen = similarities[top]
    if options.weights == "softmax":
        raw = np.exp((chosen - chosen.max()) / options.temperature)
    else:
        raw = np.maximum(chosen, 0.0)
        raw = raw if raw.sum() > 0 else np.ones(len(top))
    weights = raw / raw.sum()
    if options.order == "published":
        weights = weights[::-1]
    return {
        "anchors": [members[index] for index in top],
        "similarities": chosen.tolist(),
        "weights": weights.tolist(),
    }


def read_recipes(where: Store, fused: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """user_id -> {anchors, similarities, weights} of a `fusion` result."""
    import polars as pl

    table = pl.read_parquet(where.open(fused["ref"]).folder / "recipes.parquet")
    return {row.pop("user_id"): row for row in table.to_dicts()}

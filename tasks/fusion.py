"""Stage 6: per user a recipe, the anchors a merged LoRA is made of and their weights.

A merged LoRA is computed from its recipe when it is needed and never stored. The arithmetic is in
tasks/method/weights.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from tasks.config.options import ComputeOptions, FusionOptions
from tasks.embed import read_embeddings
from tasks.errors import InputError, label
from tasks.evidence import evidence_of
from tasks.record import OUTSIDE_KEY, File, Record
from tasks.results.models import Bank, Base, Embedded, Questions, Recipes
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.text.loading import LIBRARIES

if TYPE_CHECKING:
    import numpy as np

TABLE = "recipes.parquet"


class Asked(Record):
    """What evidence is asked of: the few-shot users' table, their questions, the base model."""

    users: File
    questions: Questions
    base: Base


class Recipe(Record):
    """One user's anchors, their similarities and weights, best first."""

    anchors: tuple[str, ...]
    similarities: tuple[float, ...]
    weights: tuple[float, ...]
    seconds: Annotated[float, OUTSIDE_KEY] = 0.0


@stage(version=4, libraries=("numpy", "polars", *LIBRARIES), uses_model=True)
def fusion(
    options: FusionOptions,
    embedded: Embedded,
    bank: Bank,
    asked: Asked | None,
    compute: ComputeOptions,
) -> Recipes:
    """Every few-shot user's recipe: anchors by similarity, or by the evidence of the user's items.

    asked: where `fusion.weights` is `evidence`. Raises InputError where the published rule gives
    no mixture.
    """
    import numpy as np
    import polars as pl

    from tasks.method import weights as method

    ids, users, anchors = unit_vectors(embedded, bank)
    seconds = [0.0] * len(ids)
    if asked:
        # Rounded, so that company, which moves the last bits, moves nobody in or out.
        shortlist = method.shortlists(np.round(users @ anchors.T, 6), options.shortlist)
        evidence = evidence_of(
            asked.users, ids, shortlist, bank, asked.questions, asked.base, compute
        )
        found = method.by_evidence(users @ anchors.T, evidence.log_likelihoods, options)
        seconds = evidence.seconds
    else:
        found = method.search(users, anchors, options)
        _refuse_no_mixture(ids, *found[1:])
    chosen, similarities, weights = found
    names = pl.Series(bank.names).gather(chosen.ravel()).reshape(chosen.shape)
    with store().new("fusion") as folder:
        pl.DataFrame(
            {
                "user_id": ids,
                "anchors": names.arr.to_list(),
                "similarities": pl.Series(similarities).arr.to_list(),
                "weights": pl.Series(weights).arr.to_list(),
                "seconds": seconds,
            }
        ).write_parquet(folder.path / TABLE)
    return Recipes(
        table=folder.file(TABLE),
        users=len(ids),
        anchors_per_user=chosen.shape[1],
        without_similar_anchor=int((similarities.max(axis=1) <= 0).sum()),
    )


def described(recipes: Recipes, options: FusionOptions) -> str:
    """How many recipes there are, of how many anchors, in one line."""
    equal = options.weights == "cosine" and options.order == "right"
    lost = recipes.without_similar_anchor if equal else 0
    return f"recipes of {recipes.users} users from {recipes.anchors_per_user} anchors each" + (
        f"; {lost} users are like no anchor (cosine <= 0) and get equal weights" if lost else ""
    )


def unit_vectors(embedded: Embedded, bank: Bank) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(few-shot user ids, their unit vectors [U, D], the bank's [K, D] in its order).

    Cosines between them are similarities. An anchor that was trained on several users stands in
    the middle of their unit vectors.
    """
    import numpy as np

    from tasks.method.whitening import unit_rows

    vectors = read_embeddings(embedded)
    ids, points = vectors["anchor"]
    row = {user_id: number for number, user_id in enumerate(ids)}
    groups = [[row[user] for user in member.members] for member in bank.members]
    means = np.stack([points[group].mean(0) for group in groups])
    users, few_shot = vectors["few_shot"]
    return users, few_shot, unit_rows(means)


def read_recipes(recipes: Recipes) -> dict[str, Recipe]:
    """user_id -> recipe."""
    import polars as pl

    table = pl.read_parquet(store().path(recipes.table))
    return {row.pop("user_id"): Recipe.model_validate(row) for row in table.to_dicts()}


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

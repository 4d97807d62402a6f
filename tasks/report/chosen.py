"""What merging chose: of which sort the anchors are that a user's LoRA is merged from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.fusion import read_recipes
from tasks.prepare import POPULATION_FILE
from tasks.store.artifacts import Store

NOISE = "noise"


def chosen_by_merging(summary: dict[str, Any], where: Store) -> list[dict[str, Any]]:
    """Per bank: the recipes' weight by the user's sort (rows) and the anchor's (columns).

    In generated worlds a sort is the true first archetype. Of other data nothing is known that is
    true of both, so an anchor's sort is its cluster, and a user's that of its most similar anchor.
    `by` says which. See `weights_by_sort` for the rest; `methods` are those that use the bank.
    """
    folder = where.open(summary["prepared"]["ref"]).folder
    first: dict[str, str] = {}
    if (folder / POPULATION_FILE).is_file():
        import polars as pl

        table = pl.read_parquet(folder / POPULATION_FILE, columns=["user_id", "first"])
        first = {user_id: str(archetype) for user_id, archetype in table.iter_rows()}
    found = []
    for bank, own in summary["banks"].items():
        recipes = read_recipes(where, own["fusion"])
        listed = [
            a for a in own["anchors"]["value"]["anchors"] if a["user_id"] in own["meta_loras"]
        ]
        if first:
            anchors = {a["user_id"]: _shares([first[m] for m in a["members"]]) for a in listed}
            users = {user_id: first[user_id] for user_id in recipes}
        else:
            sort = {a["user_id"]: _cluster(a["cluster"]) for a in listed}
            anchors = {user_id: {cluster: 1.0} for user_id, cluster in sort.items()}
            users = {user_id: sort[_most_similar(recipe)] for user_id, recipe in recipes.items()}
        found.append(
            {
                "methods": [name for name, used in summary["bank_of"].items() if used == bank],
                "by": "archetype" if first else "cluster",
                **weights_by_sort(recipes, users, anchors),
            }
        )
    return found


def weights_by_sort(
    recipes: Mapping[str, Mapping[str, Any]],
    users: Mapping[str, str],
    anchors: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """How much of users' recipes goes to anchors of which sort.

    recipes: user -> {"anchors", "weights"}, weights sum to 1. users: user -> sort. anchors: anchor
    -> sort -> share (sums to 1; several sorts where an anchor stands for several users).

    Returns
    rows, columns: the sorts of users and of anchors, sorted. users, anchors: how many of each.
    weights: [rows][columns], mean over the row's users, so a row sums to 1.
    own: mean over users of the weight on anchors of the user's own sort. equal_chosen: what equal
        weights on the same anchors would give; equal_all: on all anchors of the bank.
    """
    rows = sorted(set(users.values()), key=_order)
    columns = sorted({sort for shares in anchors.values() for sort in shares}, key=_order)
    sums = {row: dict.fromkeys(columns, 0.0) for row in rows}
    size = dict.fromkeys(rows, 0)
    own = chosen = everywhere = 0.0
    for user_id, recipe in recipes.items():
        sort = users[user_id]
        size[sort] += 1
        for anchor, weight in zip(recipe["anchors"], recipe["weights"], strict=True):
            for column, share in anchors[anchor].items():
                sums[sort][column] += weight * share
            own += weight * anchors[anchor].get(sort, 0.0)
            chosen += anchors[anchor].get(sort, 0.0) / len(recipe["anchors"])
        everywhere += sum(shares.get(sort, 0.0) for shares in anchors.values()) / len(anchors)
    return {
        "rows": rows,
        "columns": columns,
        "users": [size[row] for row in rows],
        "anchors": [sum(shares.get(c, 0.0) for shares in anchors.values()) for c in columns],
        "weights": [[sums[row][column] / size[row] for column in columns] for row in rows],
        "own": own / len(recipes),
        "equal_chosen": chosen / len(recipes),
        "equal_all": everywhere / len(recipes),
    }


def _shares(sorts: list[str]) -> dict[str, float]:
    return {sort: sorts.count(sort) / len(sorts) for sort in sorted(set(sorts))}


def _cluster(label: int) -> str:
    return NOISE if label == -1 else str(label)


def _most_similar(recipe: Mapping[str, Any]) -> str:
    """By similarity and not by place: a published recipe, or one by evidence, may differ."""
    pairs = zip(recipe["similarities"], recipe["anchors"], strict=True)
    best: str = max(pairs, key=lambda pair: pair[0])[1]
    return best


def _order(sort: str) -> tuple[int, int]:
    """Numbers by size, noise after them."""
    return (1, 0) if sort == NOISE else (0, int(sort))

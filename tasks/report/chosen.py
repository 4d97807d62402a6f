"""What merging chose: the sorts of anchors that users' LoRAs are merged from."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from tasks.recipes import Recipe, read_recipes
from tasks.results.run import Cell, Merging
from tasks.results.store import store

NOISE = "noise"


@dataclass(frozen=True)
class Weights:
    """How much of the recipes' weight goes to which sort of anchors.

    rows, columns: the sorts of users and of anchors, sorted. users, anchors: how many of each.
    weights: [rows][columns], mean over the row's users, so a row sums to 1. same_sort: mean over
    users of the weight on anchors of the user's sort. equal_chosen: that with equal weights on the
    same anchors. equal_all: that with equal weights on all anchors of the bank.
    """

    rows: list[str]
    columns: list[str]
    users: list[int]
    anchors: list[float]
    weights: list[list[float]]
    same_sort: float
    equal_chosen: float
    equal_all: float


@dataclass(frozen=True)
class Chosen:
    """The weights in the bank of `methods`. by: what a sort is: archetype, cluster or adapter."""

    lamp_task: str
    seed: int
    methods: tuple[str, ...]
    by: str
    weights: Weights


def chosen_by_merging(cell: Cell) -> list[Chosen]:
    """Per bank: the recipes' weight by the user's sort (rows) and the anchor's (columns).

    In generated worlds a sort is the true first archetype. Other data have no known truth: there an
    anchor's sort is its cluster, and a user's that of the most similar anchor. Of given adapters
    each is a sort, and a user's is the adapter of the largest weight.
    """
    first: dict[str, str] = {}
    if cell.users.population:
        table = pl.read_parquet(store().path(cell.users.population))
        first = {user: str(sort) for user, sort in table.select("user_id", "first").iter_rows()}
    task, seed = cell.config.lamp_task, cell.config.seed
    return [Chosen(task, seed, one.methods, *_weights(one, first)) for one in cell.mergings]


def _weights(merging: Merging, first: Mapping[str, str]) -> tuple[str, Weights]:
    """What a sort is, and the weights by it."""
    recipes = read_recipes(merging.merged.recipes)
    members = merging.merged.bank.members
    if merging.chosen is None:
        best = {user: recipe.anchors[0] for user, recipe in recipes.items()}
        each = {one.anchor: {one.anchor: 1.0} for one in members}
        return "adapter", weights_by_sort(recipes, best, each)
    if first:
        shares = {one.anchor: _shares([first[user] for user in one.members]) for one in members}
        users = {user: first[user] for user in recipes}
        return "archetype", weights_by_sort(recipes, users, shares)
    clusters = {
        one.name: NOISE if one.cluster == -1 else str(one.cluster) for one in merging.chosen.anchors
    }
    users = {user: clusters[_most_similar(recipe)] for user, recipe in recipes.items()}
    anchors = {one.anchor: {clusters[one.anchor]: 1.0} for one in members}
    return "cluster", weights_by_sort(recipes, users, anchors)


def weights_by_sort(
    recipes: Mapping[str, Recipe],
    users: Mapping[str, str],
    anchors: Mapping[str, Mapping[str, float]],
) -> Weights:
    """The weights by sort. users: user -> sort. anchors: anchor -> sort -> share.

    An anchor's shares sum to 1. An anchor of several users may have several sorts.
    """
    rows = sorted(set(users.values()), key=_order)
    columns = sorted({sort for shares in anchors.values() for sort in shares}, key=_order)
    sums = {row: dict.fromkeys(columns, 0.0) for row in rows}
    size = Counter(users.values())
    same = chosen = everywhere = 0.0
    for user, recipe in recipes.items():
        mine = {name: shares.get(users[user], 0.0) for name, shares in anchors.items()}
        for name, weight in zip(recipe.anchors, recipe.weights, strict=True):
            for column, share in anchors[name].items():
                sums[users[user]][column] += weight * share
            same += weight * mine[name]
            chosen += mine[name] / len(recipe.anchors)
        everywhere += sum(mine.values()) / len(mine)
    return Weights(
        rows,
        columns,
        users=[size[row] for row in rows],
        anchors=[sum(shares.get(c, 0.0) for shares in anchors.values()) for c in columns],
        weights=[[sums[row][column] / size[row] for column in columns] for row in rows],
        same_sort=same / len(recipes),
        equal_chosen=chosen / len(recipes),
        equal_all=everywhere / len(recipes),
    )


def _shares(sorts: list[str]) -> dict[str, float]:
    return {sort: sorts.count(sort) / len(sorts) for sort in sorted(set(sorts))}


def _most_similar(recipe: Recipe) -> str:
    """By similarity, since the first of a published recipe, or one by evidence, may be another."""
    return max(zip(recipe.similarities, recipe.anchors, strict=True), key=lambda pair: pair[0])[1]


def _order(sort: str) -> tuple[int, int, str]:
    """The key that sorts numbers by size, and noise and other names after them."""
    return (0, int(sort), "") if sort.isdecimal() else (1, 0, sort)

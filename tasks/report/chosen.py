"""What merging chose: of which sort the anchors are that a user's LoRA is merged from."""

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
    """How much of users' recipes goes to anchors of which sort.

    rows, columns: the sorts of users and of anchors, sorted. users, anchors: how many of each.
    weights: [rows][columns], mean over the row's users, so a row sums to 1. own: mean over users of
    the weight on anchors of the user's own sort. equal_chosen: what equal weights on the same
    anchors would give; equal_all: on all anchors of the bank.
    """

    rows: list[str]
    columns: list[str]
    users: list[int]
    anchors: list[float]
    weights: list[list[float]]
    own: float
    equal_chosen: float
    equal_all: float


@dataclass(frozen=True)
class Chosen:
    """Those of the bank of `methods`. by: what a sort is, `archetype`, `cluster` or `adapter`."""

    lamp_task: str
    seed: int
    methods: tuple[str, ...]
    by: str
    weights: Weights


def chosen_by_merging(cell: Cell) -> list[Chosen]:
    """Per bank: the recipes' weight by the user's sort (rows) and the anchor's (columns).

    In generated worlds a sort is the true first archetype. Of other data nothing is known that is
    true of both, so an anchor's sort is its cluster, and a user's that of its most similar anchor.
    Adapters that were given are a sort each, a user's the one of the largest weight.
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

    Shares sum to 1; several sorts where an anchor stands for several users.
    """
    rows = sorted(set(users.values()), key=_order)
    columns = sorted({sort for shares in anchors.values() for sort in shares}, key=_order)
    sums = {row: dict.fromkeys(columns, 0.0) for row in rows}
    size = Counter(users.values())
    own = chosen = everywhere = 0.0
    for user, recipe in recipes.items():
        mine = {name: shares.get(users[user], 0.0) for name, shares in anchors.items()}
        for name, weight in zip(recipe.anchors, recipe.weights, strict=True):
            for column, share in anchors[name].items():
                sums[users[user]][column] += weight * share
            own += weight * mine[name]
            chosen += mine[name] / len(recipe.anchors)
        everywhere += sum(mine.values()) / len(mine)
    return Weights(
        rows,
        columns,
        users=[size[row] for row in rows],
        anchors=[sum(shares.get(c, 0.0) for shares in anchors.values()) for c in columns],
        weights=[[sums[row][column] / size[row] for column in columns] for row in rows],
        own=own / len(recipes),
        equal_chosen=chosen / len(recipes),
        equal_all=everywhere / len(recipes),
    )


def _shares(sorts: list[str]) -> dict[str, float]:
    return {sort: sorts.count(sort) / len(sorts) for sort in sorted(set(sorts))}


def _most_similar(recipe: Recipe) -> str:
    """By similarity and not by place: a published recipe, or one by evidence, may differ."""
    return max(zip(recipe.similarities, recipe.anchors, strict=True), key=lambda pair: pair[0])[1]


def _order(sort: str) -> tuple[int, int, str]:
    """Numbers by size, noise and other names after them."""
    return (0, int(sort), "") if sort.isdecimal() else (1, 0, sort)

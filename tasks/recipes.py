"""Users' recipes: the anchors that a merged LoRA is made of, and their weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import polars as pl

from tasks.lamp.tables import read_table
from tasks.method.weights import Chosen
from tasks.record import OUTSIDE_KEY, Record
from tasks.results.models import Merged, Recipes, Training
from tasks.results.store import store

if TYPE_CHECKING:
    from tasks.lora.bank import Bank as LoadedBank

TABLE = "recipes.parquet"


class Recipe(Record):
    """One user's anchors, their similarities and weights, best first.

    steps, tokens: of training the weights, if they are trained. seconds: of that and of evidence.
    """

    anchors: tuple[str, ...]
    similarities: tuple[float, ...]
    weights: tuple[float, ...]
    seconds: Annotated[float, OUTSIDE_KEY] = 0.0
    steps: Annotated[int, OUTSIDE_KEY] = 0
    tokens: Annotated[int, OUTSIDE_KEY] = 0


def recipes_of(
    anchors: Sequence[str], chosen: Chosen, seconds: Sequence[float] | None = None
) -> list[Recipe]:
    """The recipes of users from their `chosen` anchors. anchors: the bank's names, in order."""
    return [
        Recipe(
            anchors=tuple(anchors[k] for k in members),
            similarities=tuple(similarities.tolist()),
            weights=tuple(weights.tolist()),
            seconds=seconds[user] if seconds else 0.0,
        )
        for user, (members, similarities, weights) in enumerate(zip(*chosen, strict=True))
    ]


def with_weights(recipe: Recipe, weights: Sequence[float], training: Training) -> Recipe:
    """The recipe with other weights, the largest first, and with the cost of training them."""
    parts = zip(weights, recipe.anchors, recipe.similarities, strict=True)
    weights, anchors, similarities = zip(*sorted(parts, key=lambda one: -one[0]), strict=True)
    return Recipe(
        anchors=anchors,
        similarities=similarities,
        weights=weights,
        seconds=recipe.seconds + training.seconds,
        steps=training.steps,
        tokens=training.tokens,
    )


def write_recipes(place: Path, ids: Sequence[str], recipes: Sequence[Recipe]) -> None:
    """Write the users' recipes as a folder's table."""
    columns = {name: [getattr(one, name) for one in recipes] for name in Recipe.model_fields}
    pl.DataFrame({"user_id": ids, **columns}).write_parquet(place / TABLE)


def read_recipes(recipes: Recipes, ids: Collection[str] | None = None) -> dict[str, Recipe]:
    """user_id -> recipe. ids: only these users, since reading all would slow down each job."""
    return recipes_in(store().path(recipes.table), ids)


def recipes_in(table: Path, ids: Collection[str] | None = None) -> dict[str, Recipe]:
    """As `read_recipes`, from a table's file."""
    rows = read_table(table, ids).to_dicts()
    return {row.pop("user_id"): Recipe.model_validate(row) for row in rows}


class Merger:
    """Merges users' LoRAs by their recipes. Recipes and bank are read once.

    recipes: of these users; None: of all few-shot users of the run.
    """

    def __init__(self, merged: Merged, recipes: Mapping[str, Recipe] | None = None) -> None:
        self.merged = merged
        self.recipes = read_recipes(merged.recipes) if recipes is None else recipes
        self._adapters = {one.anchor: one.adapter.sha256 for one in merged.bank.members}

    @cached_property
    def bank(self) -> LoadedBank:
        """The meta-LoRAs, by the names of their anchors."""
        from tasks.lora.bank import read_bank

        return read_bank(store().path(self.merged.bank.file))

    def made_of(self, user_id: str) -> list[Any]:
        """What decides the user's merged LoRA: how it is merged, each anchor's LoRA and weight."""
        recipe = self.recipes[user_id]
        pairs = zip(recipe.anchors, recipe.weights, strict=True)
        return [self.merged.how, [[name, self._adapters[name], weight] for name, weight in pairs]]

    def chosen(
        self, user_ids: Sequence[str]
    ) -> tuple[LoadedBank, list[tuple[Sequence[str], Sequence[float]]], str]:
        """What the users' LoRAs are merged from: the bank, each one's recipe, and how."""
        recipes = [self.recipes[user_id] for user_id in user_ids]
        return self.bank, [(one.anchors, one.weights) for one in recipes], self.merged.how

"""Stage 6, its second half where `fusion.weights=learned`: recipes whose weights are trained.

They begin as those of the evidence, which holds them back (tasks/lora/mixture.py). What a user
costs stays the recipe: a number per anchor.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars as pl

from tasks.config.options import LearnedOptions
from tasks.fusion import TABLE, Merger, Recipe, read_recipes
from tasks.log import log
from tasks.prepare import users_of
from tasks.record import File, Record, key_of
from tasks.results.models import Merged, Recipes, Setting
from tasks.results.rows import Rows
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.running.slots import gpu_slot
from tasks.text.loading import LIBRARIES, load
from tasks.text.questions import content
from tasks.text.tokens import tokens_of

if TYPE_CHECKING:
    from tasks.lora.base import Base
    from tasks.lora.batches import Encoded
    from tasks.lora.merge import MergedUsers


LEARNED_FILE = "learned.parquet"


class Learned(Record):
    """A user's trained weights, in the order of the recipe's anchors, and what training took."""

    weights: tuple[float, ...]
    steps: int
    tokens: int
    seconds: float = 0.0


@stage(version=1, libraries=LIBRARIES, uses_model=True)
def learned_weights(
    options: LearnedOptions, merged: Merged, users: File, setting: Setting
) -> Recipes:
    """The recipes of `merged`, with weights trained on each user's items.

    users: the few-shot users' table. Who did not change, like the recipe and its anchors, is taken
    from an earlier table.
    """
    from tasks.lora.merge import MergedUsers

    merger, names = Merger(merged), [*read_recipes(merged.recipes)]
    profiles = {user["user_id"]: user["profile"] for user in users_of(users, names)}
    shared = key_of(learned_weights.identity, options, setting)
    keys = [key_of(shared, content(profiles[name]), merger.made_of(name)) for name in names]
    rows = Rows("learned_weights", keys, _read)
    if rows.missing:
        log(f"learning the weights of {rows.counted()}")
        missing = [names[number] for number in rows.missing]
        with gpu_slot():
            started = time.perf_counter()
            base, chosen = setting.base, [{"profile": profiles[name]} for name in missing]
            loaded = load(base, setting.compute)
            samples = tokens_of(setting.questions, base, loaded, "profile", chosen)
            below = MergedUsers(*merger.chosen(missing), loaded.device)
            made = learn(loaded, options, below, [list(own) for own in samples])
            each = round((time.perf_counter() - started) / len(missing), 4)
        rows.add(one.model_copy(update={"seconds": each}) for one in made)
    learned = rows.all()
    recipes = [
        with_weights(merger.recipes[name], one) for name, one in zip(names, learned, strict=True)
    ]
    with rows.folder() as folder:
        for file, table in ((TABLE, recipes), (LEARNED_FILE, learned)):
            columns = {"user_id": names} | {
                field: [getattr(one, field) for one in table]
                for field in type(table[0]).model_fields
            }
            pl.DataFrame(columns).write_parquet(folder.path / file)
    return merged.recipes.model_copy(update={"table": folder.file(TABLE)})


def learn(
    base: Base, options: LearnedOptions, merged: MergedUsers, samples: Sequence[Sequence[Encoded]]
) -> list[Learned]:
    """Each user's weights, trained at once, each as if alone.

    In six decimals: the company of other users moves the last bits of a sum.
    """
    from tasks.lora.grouped import grouped
    from tasks.lora.mixture import train_weights

    with grouped(base.model, list(merged.layers)) as layers:
        outcome = train_weights(base, layers, merged, samples, **options.model_dump())
    return [
        Learned(
            weights=tuple(round(one, 6) for one in own),
            steps=len(outcome.losses[user]),
            tokens=outcome.tokens[user],
        )
        for user, own in enumerate(outcome.flat.tolist())
    ]


def with_weights(recipe: Recipe, learned: Learned) -> Recipe:
    """The recipe with its trained weights, the largest first."""
    parts = zip(learned.weights, recipe.anchors, recipe.similarities, strict=True)
    weights, anchors, similarities = zip(*sorted(parts, key=lambda one: -one[0]), strict=True)
    return Recipe(
        anchors=anchors,
        similarities=similarities,
        weights=weights,
        seconds=recipe.seconds + learned.seconds,
        steps=learned.steps,
        tokens=learned.tokens,
    )


def _read(folder: File) -> list[Learned]:
    rows = pl.read_parquet(store().path(folder) / LEARNED_FILE).drop("user_id").to_dicts()
    return [Learned.model_validate(row) for row in rows]

"""Stage 6: per user a recipe, the anchors a merged LoRA is made of and their weights.

A merged LoRA is computed from its recipe when it is needed and never stored. The arithmetic is in
tasks/method/weights.py.

Evidence, which recipes may go by, is log p(items of u | anchor k), summed over the items' answers:
what Bayesian model averaging over the bank weighs its members by (docs/method.md, Fusion). It costs
one pass of the items per anchor and no training; where the bank is large, `fusion.shortlist`
narrows it to the most similar anchors.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import polars as pl

from tasks.config.options import FusionOptions
from tasks.embed import read_embeddings
from tasks.errors import InputError, label
from tasks.lamp.tables import read_table
from tasks.log import log
from tasks.method.weights import Chosen, Floats, by_evidence, search, shortlists
from tasks.method.whitening import unit_rows
from tasks.prepare import users_in_order
from tasks.record import OUTSIDE_KEY, File, Record, key_of
from tasks.results.models import Bank, Embedded, Evidence, Merged, Recipes, Setting
from tasks.results.rows import Rows
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.running.slots import gpu_slot
from tasks.text.loading import LIBRARIES, load
from tasks.text.questions import content
from tasks.text.tokens import tokens_of
from tasks.training import log_likelihoods

if TYPE_CHECKING:
    from tasks.lora.bank import Bank as LoadedBank

TABLE = "recipes.parquet"
EVIDENCE_FILE = "evidence.parquet"


class Recipe(Record):
    """One user's anchors, their similarities and weights, best first.

    steps, tokens: of training the weights, if they are. seconds: of evidence, and of that.
    """

    anchors: tuple[str, ...]
    similarities: tuple[float, ...]
    weights: tuple[float, ...]
    seconds: Annotated[float, OUTSIDE_KEY] = 0.0
    steps: Annotated[int, OUTSIDE_KEY] = 0
    tokens: Annotated[int, OUTSIDE_KEY] = 0


@stage(version=3, libraries=(*LIBRARIES, "numpy"), uses_model=True)
def evidence(
    shortlist: int | None, embedded: Embedded, bank: Bank, users: File, setting: Setting
) -> Evidence:
    """Each few-shot user's evidence for all anchors, or for the `shortlist` most similar ones.

    users: the few-shot users' table. Who did not change, like the anchors asked, is taken from an
    earlier table.
    """
    from tasks.lora.bank import read_bank

    ids, vectors, anchors = unit_vectors(embedded, bank)
    asked = shortlists(vectors @ anchors.T, shortlist).tolist()
    questions, base = setting.questions, setting.base
    profiles = [user["profile"] for user in users_in_order(users, ids)]
    adapters = [member.adapter for member in bank.members]
    shared = key_of(evidence.identity, setting)
    keys = []
    for profile, own in zip(profiles, asked, strict=True):
        whom = [lora if ask else None for lora, ask in zip(adapters, own, strict=True)]
        keys.append(key_of(shared, content(profile), whom))

    rows = Rows("evidence", keys, _read_evidence)
    if rows.missing:
        log(f"evidence for {len(adapters)} anchors of {rows.counted()}")
        with gpu_slot():
            started = time.perf_counter()
            loaded, loras = load(base, setting.compute), read_bank(store().path(bank.file))
            chosen = [{"profile": profiles[number]} for number in rows.missing]
            samples = [list(own) for own in tokens_of(questions, base, loaded, "profile", chosen)]
            pairs = [asked[number] for number in rows.missing]
            table = log_likelihoods(loaded, loras, samples, pairs, base.engine)
            each = round((time.perf_counter() - started) / len(chosen), 4)
        rows.add([(row, each) for row in table.tolist()])
    likelihoods, seconds = zip(*rows.all(), strict=True)
    with rows.folder() as folder:
        columns = {"user_id": ids, "log_likelihoods": likelihoods, "seconds": seconds}
        kinds = {"log_likelihoods": pl.List(pl.Float64)}
        pl.DataFrame(columns, schema_overrides=kinds).write_parquet(folder.path / EVIDENCE_FILE)
    return Evidence(table=folder.file(EVIDENCE_FILE))


@stage(version=5, libraries=("numpy", "polars"))
def fusion(
    options: FusionOptions, embedded: Embedded, bank: Bank, evidence: Evidence | None
) -> Recipes:
    """Every few-shot user's recipe: anchors by similarity, or by `evidence` where it is given.

    Raises InputError where the published rule gives no mixture.
    """
    ids, users, anchors = unit_vectors(embedded, bank)
    seconds, known = [0.0] * len(ids), None
    if evidence:
        table = pl.read_parquet(store().path(evidence.table))
        seconds = table["seconds"].to_list()
        known = np.array(table["log_likelihoods"].to_list(), dtype=float)
    chosen, similarities, weights = chosen_anchors(options, ids, users, anchors, known)
    with store().new("fusion") as folder:
        write_recipes(folder.path, bank, ids, (chosen, similarities, weights), seconds)
    return Recipes(
        table=folder.file(TABLE),
        users=len(ids),
        anchors_per_user=chosen.shape[1],
        without_similar_anchor=int((similarities.max(axis=1) <= 0).sum()),
    )


def write_recipes(
    place: Path, bank: Bank, ids: Sequence[str], chosen: Chosen, seconds: Sequence[float]
) -> None:
    """Write users' recipes as a folder's table (`Recipes`); chosen: as of `chosen_anchors`."""
    members, similarities, weights = chosen
    names = pl.Series(bank.names).gather(members.ravel()).reshape(members.shape)
    columns = {
        "user_id": ids,
        "anchors": names.arr.to_list(),
        "similarities": pl.Series(similarities).arr.to_list(),
        "weights": pl.Series(weights).arr.to_list(),
        "seconds": seconds,
    }
    pl.DataFrame(columns).write_parquet(place / TABLE)


def chosen_anchors(
    options: FusionOptions, ids: Sequence[str], users: Floats, anchors: Floats, known: Floats | None
) -> Chosen:
    """Each user's anchors (numbers in the bank), their similarities and weights, each [U, m].

    users [U, D], anchors [K, D]: unit vectors. known [U, K]: evidence, which decides where it is
    given. Raises InputError where the published rule gives no mixture.
    """
    if known is not None:
        return by_evidence(users @ anchors.T, known, options)
    found = search(users, anchors, options)
    _refuse_no_mixture(ids, *found[1:])
    return found


def described(recipes: Recipes, options: FusionOptions) -> str:
    """How many recipes there are, of how many anchors, in one line."""
    equal = options.weights == "cosine" and options.order == "right"
    lost = recipes.without_similar_anchor if equal else 0
    return f"recipes of {recipes.users} users from {recipes.anchors_per_user} anchors each" + (
        f"; {lost} users are like no anchor (cosine <= 0) and get equal weights" if lost else ""
    )


def unit_vectors(embedded: Embedded, bank: Bank) -> tuple[list[str], Floats, Floats]:
    """(few-shot user ids, their unit vectors [U, D], the bank's [K, D] in its order).

    Cosines between them are similarities.
    """
    vectors = read_embeddings(embedded)
    users, few_shot = vectors["few_shot"]
    return users, few_shot, bank_vectors(bank, *vectors["anchor"])


def bank_vectors(bank: Bank, ids: Sequence[str], points: Floats) -> Floats:
    """The bank's unit vectors [K, D], of the candidates' ids and unit vectors [U, D].

    An anchor that was trained on several users stands in the middle of their unit vectors. An
    adapter that was given has no users, and the zero vector: it is like nobody.
    """
    row = {user_id: number for number, user_id in enumerate(ids)}
    groups = [[row[user] for user in member.members] for member in bank.members]
    nobody = np.zeros(points.shape[1])
    return unit_rows(np.stack([points[own].mean(0) if own else nobody for own in groups]))


def read_recipes(recipes: Recipes, ids: Collection[str] | None = None) -> dict[str, Recipe]:
    """user_id -> recipe; with `ids` of these users alone, as all would take each job long."""
    table = read_table(store().path(recipes.table), ids)
    return {row.pop("user_id"): Recipe.model_validate(row) for row in table.to_dicts()}


class Merger:
    """Merges users' LoRAs by their recipes; recipes and bank are read once.

    recipes: of other users than the run's.
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


def _refuse_no_mixture(users: Sequence[str], similarities: Floats, weights: Floats) -> None:
    """Raises InputError for a user with a weight outside 0 to 1, as the published merger does."""
    wrong = np.flatnonzero(~((weights >= 0) & (weights <= 1)).all(axis=1))
    if len(wrong):
        own = ", ".join(f"{one:g}" for one in similarities[wrong[0]])
        raise InputError(
            f"fusion.order published: user {label(users[wrong[0]])} has the similarities {own}, "
            f"whose shares are no weights from 0 to 1 (so have {len(wrong)} of {len(users)} "
            "users), and the published merger raises there, too; use order=right or "
            "weights=softmax, or leave out the method mta_published, which has this order"
        )


def _read_evidence(folder: File) -> list[tuple[list[float], float]]:
    table = pl.read_parquet(store().path(folder) / EVIDENCE_FILE)
    return list(table.select("log_likelihoods", "seconds").iter_rows())

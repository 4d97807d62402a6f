"""Stage 6: each user's recipe: the anchors that the merged LoRA is made of, and their weights.

A merged LoRA is computed from its recipe when it is needed and never stored. The arithmetic is in
tasks/method/weights.py.

Evidence is log p(items of user u | anchor k), summed over the items' answers. Bayesian model
averaging weighs a bank's members by it (docs/method.md, Fusion). It costs one pass of the items per
anchor and no training. For a large bank, `fusion.shortlist` asks the most similar anchors only.
`learned` weights begin as the evidence's, which a penalty keeps them near (tasks/lora/mixture.py).
Either way a user's recipe is one number per anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from tasks.config.options import FusionOptions, LearnedOptions
from tasks.embed import measured, read_embeddings
from tasks.errors import InputError, label
from tasks.log import log
from tasks.method.clusters import outstanding
from tasks.method.weights import (
    Chosen,
    Floats,
    by_evidence,
    search,
    shortlists,
    vector_likelihoods,
)
from tasks.method.whitening import unit_rows
from tasks.model import Model, loaded_model
from tasks.recipes import TABLE, Merger, Recipe, recipes_in, recipes_of, with_weights, write_recipes
from tasks.record import File, derive_seed, key_of
from tasks.results.models import Bank, Embedded, Evidence, Merged, Recipes, Setting, Training
from tasks.results.rows import Rows
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.text.loading import LIBRARIES
from tasks.text.questions import content
from tasks.users import users_in_order

if TYPE_CHECKING:
    from tasks.lora.batches import Encoded
    from tasks.lora.merge import MergedUsers

EVIDENCE_FILE = "evidence.parquet"


def merged_loras(
    options: FusionOptions, embedded: Embedded, bank: Bank, few_shot: File, setting: Setting
) -> Merged:
    """What few-shot users' LoRAs are merged from. Logs how many recipes there are."""
    weighed = None
    if options.by_evidence:
        weighed = evidence(options.shortlist, embedded, bank, few_shot, setting)
    recipes = fusion(options, embedded, bank, weighed, setting.seed)
    log(described(recipes, options))
    merged = Merged(bank=bank, recipes=recipes, how=options.merge)
    if options.weights == "learned":
        recipes = learned_weights(options.learned, merged, few_shot, setting)
    return merged.model_copy(update={"recipes": recipes})


@stage(version=4, libraries=(*LIBRARIES, "numpy"), uses_model=True)
def evidence(
    shortlist: int | None, embedded: Embedded, bank: Bank, users: File, setting: Setting
) -> Evidence:
    """Each few-shot user's evidence for all anchors, or for the `shortlist` most similar ones.

    users: the few-shot users' table. Users are taken from an earlier table if they and the anchors
    asked are the same.
    """
    from tasks.lora.bank import read_bank

    ids, vectors, anchors = unit_vectors(embedded, bank)
    asked = shortlists(vectors @ anchors.T, shortlist).tolist()
    asking = users_in_order(users, ids)
    adapters = [member.adapter for member in bank.members]
    shared = key_of(evidence.identity, setting)
    keys = []
    for user, row in zip(asking, asked, strict=True):
        whom = [lora if ask else None for lora, ask in zip(adapters, row, strict=True)]
        keys.append(key_of(shared, content(user["profile"]), whom))
    rows = Rows("evidence", keys, _read_evidence)
    if rows.missing:
        log(f"evidence for {len(adapters)} anchors of {rows.counted()}")
        with loaded_model(setting) as model:
            chosen = [asking[number] for number in rows.missing]
            samples = [[*items] for items in model.tokens("profile", chosen)]
            pairs = [asked[number] for number in rows.missing]
            table = model.log_likelihoods(read_bank(store().path(bank.file)), samples, pairs)
            each = model.seconds_each(len(chosen))
        rows.add([(row, each) for row in table.tolist()])
    likelihoods, seconds = zip(*rows.all(), strict=True)
    with rows.folder() as folder:
        columns = {
            "user_id": ids,
            "items": [len(user["profile"]) for user in asking],
            "log_likelihoods": likelihoods,
            "seconds": seconds,
        }
        kinds = {"log_likelihoods": pl.List(pl.Float64)}
        pl.DataFrame(columns, schema_overrides=kinds).write_parquet(folder.path / EVIDENCE_FILE)
    return Evidence(table=folder.file(EVIDENCE_FILE))


def _read_evidence(folder: File) -> list[tuple[list[float], float]]:
    table = pl.read_parquet(store().path(folder) / EVIDENCE_FILE)
    return list(table.select("log_likelihoods", "seconds").iter_rows())


@stage(version=6, libraries=("numpy", "polars"))
def fusion(
    options: FusionOptions, embedded: Embedded, bank: Bank, evidence: Evidence | None, seed: int
) -> Recipes:
    """Every few-shot user's recipe: anchors by similarity, or by `evidence` if there is any.

    Raises InputError if the published order gives weights outside 0 to 1.
    """
    sides, place = measured(embedded)
    (ids, users), (candidates, points) = (
        (names, place(vectors)) for names, vectors in (sides["few_shot"], sides["anchor"])
    )
    anchors = bank_vectors(bank, candidates, unit_rows(points))
    seconds, known = None, None
    if evidence:
        table = pl.read_parquet(store().path(evidence.table))
        seconds = table["seconds"].to_list()
        known = np.array(table["log_likelihoods"].to_list(), dtype=float)
        if both := vector_evidence(options, embedded, bank, candidates, points, seed):
            known = both(known, users, table["items"].to_list())
    chosen = weighed_anchors(options, ids, unit_rows(users), anchors, known)
    members, similarities, _ = chosen
    with store().new("fusion") as folder:
        write_recipes(folder.path, ids, recipes_of(bank.names, chosen, seconds))
    return Recipes(
        table=folder.file(TABLE),
        users=len(ids),
        anchors_per_user=members.shape[1],
        without_similar_anchor=int((similarities.max(axis=1) <= 0).sum()),
    )


def described(recipes: Recipes, options: FusionOptions) -> str:
    """One line: how many recipes there are, of how many anchors."""
    equal = options.weights == "cosine" and options.order == "right"
    lost = recipes.without_similar_anchor if equal else 0
    return f"recipes of {recipes.users} users from {recipes.anchors_per_user} anchors each" + (
        f"; {lost} users are like no anchor (cosine <= 0) and get equal weights" if lost else ""
    )


def weighed_anchors(
    options: FusionOptions, ids: Sequence[str], users: Floats, anchors: Floats, known: Floats | None
) -> Chosen:
    """Each user's anchors (numbers in the bank), their similarities and weights, each [U, m].

    users [U, D], anchors [K, D]: unit vectors. known [U, K]: evidence; with it, it decides. Raises
    InputError for a user with a weight outside 0 to 1, as the published merger does.
    """
    if known is not None:
        return by_evidence(users @ anchors.T, known, options)
    chosen = search(users, anchors, options)
    _, similarities, weights = chosen
    wrong = np.flatnonzero(~((weights >= 0) & (weights <= 1)).all(axis=1))
    if len(wrong):
        listed = ", ".join(f"{one:g}" for one in similarities[wrong[0]])
        raise InputError(
            f"fusion.order published: user {label(ids[wrong[0]])} has the similarities {listed}, "
            f"whose shares are no weights from 0 to 1 (so have {len(wrong)} of {len(ids)} "
            "users), and the published merger raises there, too; use order=right or "
            "weights=softmax, or leave out the method mta_published, which has this order"
        )
    return chosen


def unit_vectors(embedded: Embedded, bank: Bank) -> tuple[list[str], Floats, Floats]:
    """(few-shot user ids, their unit vectors [U, D], the bank's [K, D] in its order).

    Cosines between them are similarities.
    """
    vectors = read_embeddings(embedded)
    return *vectors["few_shot"], bank_vectors(bank, *vectors["anchor"])


def bank_vectors(bank: Bank, ids: Sequence[str], points: Floats) -> Floats:
    """The bank's unit vectors [K, D], from the candidates' ids and unit vectors [U, D].

    An anchor trained on several users has the mean of their unit vectors, scaled to length 1. A
    given adapter has no users, so it gets the zero vector: it is similar to nobody.
    """
    return unit_rows(_means(bank, ids, points))


def _means(bank: Bank, ids: Sequence[str], points: Floats) -> Floats:
    """[K, D]: the mean of the points [U, D] of each anchor's users; zeros if it has none."""
    row = {user_id: number for number, user_id in enumerate(ids)}
    groups = [[row[user] for user in member.members] for member in bank.members]
    nobody = np.zeros(points.shape[1])
    return np.stack([points[rows].mean(0) if rows else nobody for rows in groups])


class VectorEvidence:
    """Evidence from users' answers and from their vectors: the mean of both log-likelihoods.

    That is a logarithmic opinion pool of equal weights (Genest & Zidek 1986). Vectors count along
    the principal axes of the candidates' directions that stand out of noise (`outstanding`). The
    mean of a thousand vectors is a little off in every direction, and directions are thousands.
    """

    def __init__(self, bank: Bank, ids: Sequence[str], points: Floats, seed: int) -> None:
        """points [U, D]: whitened vectors of the candidates `ids`. seed: of the run."""
        self.axes = outstanding(unit_rows(points), derive_seed(seed, "cluster"))
        self.anchors = _means(bank, ids, points) @ self.axes
        # A given adapter has no known users. Then vectors say nothing, of any anchor.
        self.known = all(member.members for member in bank.members)

    def __call__(self, evidence: Floats, users: Floats, items: Sequence[int]) -> Floats:
        """[U, K], from `evidence` [U, K] and whitened vectors [U, D], each of so many items."""
        if not self.known:
            return evidence
        return (evidence + vector_likelihoods(users @ self.axes, items, self.anchors)) / 2


def vector_evidence(
    options: FusionOptions, embedded: Embedded, bank: Bank, ids: Sequence[str], points: Floats,
    seed: int,
) -> VectorEvidence | None:  # fmt: skip
    """That of the candidates' vectors `points`; None if the options use no vectors."""
    wanted = options.by_evidence and options.vectors and embedded.whitening
    return VectorEvidence(bank, ids, points, seed) if wanted else None


@stage(version=2, libraries=LIBRARIES, uses_model=True)
def learned_weights(
    options: LearnedOptions, merged: Merged, users: File, setting: Setting
) -> Recipes:
    """The recipes of `merged`, with weights trained on each user's items.

    users: the few-shot users' table. Users are taken from an earlier table if they, their recipe
    and its anchors are the same.
    """
    from tasks.lora.merge import MergedUsers

    merger = Merger(merged)
    names = [*merger.recipes]
    asked = users_in_order(users, names)
    shared = key_of(learned_weights.identity, options, setting)
    keys = [
        key_of(shared, content(user["profile"]), merger.made_of(name), merger.recipes[name])
        for name, user in zip(names, asked, strict=True)
    ]
    rows = Rows("learned_weights", keys, _read_recipes)
    if rows.missing:
        log(f"learning the weights of {rows.counted()}")
        missing = [names[number] for number in rows.missing]
        with loaded_model(setting) as model:
            samples = model.tokens("profile", [asked[number] for number in rows.missing])
            below = MergedUsers(*merger.chosen(missing), model.base.device)
            before = [merger.recipes[name] for name in missing]
            rows.add(learn(model, options, below, [[*items] for items in samples], before))
    with rows.folder() as folder:
        write_recipes(folder.path, names, rows.all())
    return merged.recipes.model_copy(update={"table": folder.file(TABLE)})


def _read_recipes(folder: File) -> list[Recipe]:
    return [*recipes_in(store().path(folder) / TABLE).values()]


def learn(
    model: Model,
    options: LearnedOptions,
    merged: MergedUsers,
    samples: Sequence[Sequence[Encoded]],
    recipes: Sequence[Recipe],
) -> list[Recipe]:
    """The recipes with trained weights, largest first. Users train at once, each as if alone.

    Weights have six decimals: the other users of a batch change the last bits of a sum.
    """
    from tasks.lora.grouped import grouped
    from tasks.lora.mixture import train_weights

    with grouped(model.base.model, list(merged.layers)) as layers:
        outcome = train_weights(model.base, layers, merged, samples, **options.model_dump())
    each = model.seconds_each(len(samples))
    return [
        with_weights(
            recipe,
            [round(one, 6) for one in weights],
            Training(seconds=each, steps=len(outcome.losses[user]), tokens=outcome.tokens[user]),
        )
        for user, (recipe, weights) in enumerate(zip(recipes, outcome.flat.tolist(), strict=True))
    ]

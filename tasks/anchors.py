"""Stage 4: clusters of the anchor candidates, and the anchors chosen from them.

Embeddings tell users apart as far as the embedding sees what differs between them. What decides in
the end is which LoRA answers a user's items best, so with `anchors.refits` the clusters are fitted
again as a mixture of LoRAs, by hard EM (Dempster, Laird & Rubin 1977; classification EM of Celeux &
Govaert 1992). Round by round, `anchors.refits` at most:

    M  each cluster's LoRA is trained on the first, third, ... item of its members, going on from
       the round before; clusters with fewer than `min_cluster_size` members are given up;
    E  each candidate goes to the cluster under whose LoRA the candidate's other items, which no
       LoRA has seen, are likeliest. HDBSCAN's noise is assigned like all others. The first round
       asks all clusters, later ones only those that were the candidate's NEAREST the round before:
       asking is most of the work, and hardly anybody moves farther.

It ends early when no more than one candidate in a hundred moves.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from tasks.config.options import AnchorOptions, TrainingOptions
from tasks.embed import read_embeddings
from tasks.errors import InputError
from tasks.log import log
from tasks.method import clusters as rule
from tasks.model import checkpoint, loaded_model
from tasks.record import File, derive_seed
from tasks.results.models import Anchor, Anchors, Clusters, Embedded, Setting
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.text.loading import LIBRARIES
from tasks.users import each_user, users_of

BANK, TABLE = "bank.safetensors", "anchors.parquet"
SETTLED = 0.01
NEAREST = 4


def chosen_anchors(
    options: AnchorOptions,
    training: TrainingOptions,
    embedded: Embedded,
    candidates: File,
    setting: Setting,
) -> Anchors:
    """The anchors; in the log, how they were chosen. training: of meta-LoRAs."""
    found = clustered(options, training, embedded, candidates, setting)
    chosen = anchors(options, embedded, candidates, found)
    few = 0 < chosen.single_users < chosen.asked
    log(described(chosen, options.min_items), warning=few)
    return chosen


def clustered(
    options: AnchorOptions,
    training: TrainingOptions,
    embedded: Embedded,
    candidates: File,
    setting: Setting,
) -> Clusters:
    """The candidates' clusters, fitted again where `options` say so.

    training: of meta-LoRAs; the clusters' LoRAs are trained alike, for `refit_epochs`.
    """
    found = clusters(options, embedded, setting.seed)
    how = training.model_copy(update={"epochs": options.refit_epochs})
    moved: list[int] = []
    for number in range(options.refits if options.train_on != "user" else 0):
        found = refit(found, options.min_cluster_size, how, candidates, number, setting)
        moved.append(found.moved)
        if found.moved <= SETTLED * len(found.clusters):
            break
    if moved:
        log(
            f"{len(set(found.clusters) - {-1})} clusters after {len(moved)} rounds; candidates "
            f"that moved in each: {', '.join(map(str, moved))}"
        )
    return found


@stage(version=1, libraries=("hdbscan", "scikit-learn", "numpy"))
def clusters(options: AnchorOptions, embedded: Embedded, seed: int) -> Clusters:
    """The candidates' clusters by their embeddings."""
    points = read_embeddings(embedded)["anchor"][1]
    return Clusters(clusters=tuple(rule.cluster(points, options, derive_seed(seed, "cluster"))))


@stage(version=4, libraries=(*LIBRARIES, "numpy"), uses_model=True)
def refit(
    before: Clusters,
    smallest: int,
    training: TrainingOptions,
    candidates: File,
    number: int,
    setting: Setting,
) -> Clusters:
    """Round `number`: clusters of `smallest` members or more, after the round `before`.

    It depends on neither few-shot users nor the number of rounds, nor on which clusters become
    anchors; where only these changed it is found.
    """
    from tasks.lora.bank import read_bank, stack, write_bank

    labels, large = list(before.clusters), rule.large_clusters(before.clusters, smallest)
    if not large:
        return Clusters(clusters=before.clusters)
    users, names = users_of(candidates), [str(k) for k in large]
    key = refit.key(before, smallest, training, candidates, number, setting)
    # All candidates: the LoRAs of the round before had their say in who is in which cluster.
    everybody = [user["user_id"] for user in users]
    with (
        checkpoint(setting.compute, "refit", key, everybody) as kept,
        store().new("refit") as folder,
        loaded_model(setting) as model,
    ):
        encoded = [[*own] for own in model.tokens("profile", users)]
        earlier = read_bank(store().path(before.bank)) if before.bank else None
        made = model.train(
            training,
            rule.shown(encoded, labels, large),
            [derive_seed(setting.seed, "refit", str(number), name) for name in names],
            initial=[earlier.lora(name) for name in names] if earlier else None,
            checkpoint=kept,
        )
        bank = stack(names, [lora for lora, _ in made])
        write_bank(folder.path / BANK, bank)
        held_out = [own[1::2] for own in encoded]
        asked = rule.to_ask(before.nearest, large) if before.nearest else None
        found = model.log_likelihoods(bank, held_out, asked)
    # A LoRA that gives no number is nobody's.
    evidence = np.nan_to_num(found, nan=-np.inf)
    new = rule.assign(labels, evidence, [len(own) for own in held_out], large)
    return Clusters(
        clusters=tuple(new),
        nearest=tuple(map(tuple, rule.nearest(evidence, large, NEAREST))),
        moved=sum(one != other for one, other in zip(new, labels, strict=True)),
        bank=folder.file(BANK),
    )


@stage(version=7, libraries=("scikit-learn", "numpy", "polars"))
def anchors(
    options: AnchorOptions, embedded: Embedded, candidates: File, clusters: Clusters
) -> Anchors:
    """The anchors in order of choice, with their members.

    candidates: the table of anchor candidates. Raises InputError where nobody can be an anchor.
    """
    vectors = read_embeddings(embedded)
    (ids, points), (few_ids, few_points) = vectors["anchor"], vectors["few_shot"]
    sizes = {user["user_id"]: len(user["profile"]) for user in each_user(candidates)}
    items, labels = [sizes[user_id] for user_id in ids], list(clusters.clusters)
    members = rule.members_of(ids, items, labels, options)
    if not members:
        raise InputError(_no_anchor(items, options))
    order = {name: number for number, name in enumerate(members)}
    flat, nothing = rule.plane(points, few_points), [None] * len(few_ids)
    columns = {
        "role": ["anchor"] * len(ids) + ["few_shot"] * len(few_ids),
        "user_id": ids + few_ids,
        "items": items + nothing,
        "cluster": labels + nothing,
        "x": flat[:, 0],
        "y": flat[:, 1],
        "order": [order.get(user_id) for user_id in ids] + nothing,
    }
    with store().new("anchors") as folder:
        pl.DataFrame(columns).write_parquet(folder.path / TABLE)
    label = dict(zip(ids, labels, strict=True))
    return Anchors(
        table=folder.file(TABLE),
        anchors=tuple(
            Anchor(
                name=name,
                items=sum(sizes[member] for member in own),
                cluster=label[own[0]],
                members=tuple(own),
            )
            for name, own in members.items()
        ),
        whole_clusters=len(members.keys() - sizes.keys()),
        asked=options.count,
        candidates=len(ids),
        eligible=sum(count >= options.min_items for count in items),
        clusters=len(set(labels) - {-1}),
        noise=labels.count(-1),
    )


def described(chosen: Anchors, min_items: int) -> str:
    """What was chosen of whom, in one line."""
    kinds = [f"{chosen.whole_clusters} whole clusters"] if chosen.whole_clusters else []
    among = f"{chosen.candidates} candidates"
    if alone := chosen.single_users:
        kinds.append(f"{alone} users of {chosen.asked} asked")
        among += f" ({chosen.eligible} with {min_items} items or more)"
    return (
        f"anchors: {' and '.join(kinds)}, from {among} in {chosen.clusters} clusters, "
        f"{chosen.noise} noise"
    )


def _no_anchor(items: Sequence[int], options: AnchorOptions) -> str:
    """Why there is no anchor, and what helps."""
    if enough := sum(count >= options.min_items for count in items):
        return (
            f"no anchor: the {enough} candidates with anchors.min_items {options.min_items} items "
            "or more are all noise, which anchors.noise never leaves out; use noise last, or a "
            "smaller anchors.min_cluster_size"
        )
    return (
        f"no anchor: none of {len(items)} candidates has anchors.min_items {options.min_items} "
        f"items or more, the longest history has {max(items)}; lower it or give longer histories"
    )

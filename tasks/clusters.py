"""Stage 4, before anchors are chosen: clusters of the candidates, by embeddings and by evidence.

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

from __future__ import annotations

import numpy as np

from tasks.config.options import AnchorOptions, TrainingOptions
from tasks.config.task import derive_seed
from tasks.embed import read_embeddings
from tasks.log import log
from tasks.method.clusters import assign, cluster, large_clusters, nearest, shown, to_ask
from tasks.prepare import users_of
from tasks.record import File
from tasks.results.models import Clusters, Embedded, Setting
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.running.slots import gpu_slot
from tasks.text.loading import LIBRARIES, load
from tasks.text.tokens import tokens_of
from tasks.training import checkpoint, log_likelihoods, train_loras

BANK = "bank.safetensors"
SETTLED = 0.01
NEAREST = 4


def clustered(
    anchors: AnchorOptions,
    training: TrainingOptions,
    embedded: Embedded,
    candidates: File,
    setting: Setting,
) -> Clusters:
    """The candidates' clusters, fitted again where `anchors` says so.

    training: of meta-LoRAs; the clusters' LoRAs are trained alike, for `refit_epochs`.
    """
    found = clusters(anchors, embedded, setting.seed)
    how = training.model_copy(update={"epochs": anchors.refit_epochs})
    moved: list[int] = []
    for number in range(anchors.refits if anchors.train_on != "user" else 0):
        found = refit(found, anchors.min_cluster_size, how, candidates, number, setting)
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
    return Clusters(clusters=tuple(cluster(points, options, derive_seed(seed, "cluster"))))


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

    labels, large = list(before.clusters), large_clusters(before.clusters, smallest)
    if not large:
        return Clusters(clusters=before.clusters)
    users, names = users_of(candidates), [str(k) for k in large]
    key = refit.key(before, smallest, training, candidates, number, setting)
    # All candidates: the LoRAs of the round before had their say in who is in which cluster.
    everybody = [user["user_id"] for user in users]
    with (
        checkpoint(setting.compute, "refit", key, everybody) as kept,
        store().new("refit") as folder,
        gpu_slot(),
    ):
        loaded = load(setting.base, setting.compute)
        encoded = [
            list(own)
            for own in tokens_of(setting.questions, setting.base, loaded, "profile", users)
        ]
        earlier = read_bank(store().path(before.bank)) if before.bank else None
        loras, _ = train_loras(
            loaded,
            training,
            shown(encoded, labels, large),
            [derive_seed(setting.seed, "refit", str(number), name) for name in names],
            initial=[earlier.lora(name) for name in names] if earlier else None,
            checkpoint=kept,
            engine=setting.base.engine,
        )
        bank = stack(names, loras)
        write_bank(folder.path / BANK, bank)
        held_out = [own[1::2] for own in encoded]
        asked = to_ask(before.nearest, large) if before.nearest else None
        found = log_likelihoods(loaded, bank, held_out, asked, engine=setting.base.engine)
    # A LoRA that gives no number is nobody's.
    evidence = np.nan_to_num(found, nan=-np.inf)
    new = assign(labels, evidence, [len(own) for own in held_out], large)
    return Clusters(
        clusters=tuple(new),
        nearest=tuple(map(tuple, nearest(evidence, large, NEAREST))),
        moved=sum(one != other for one, other in zip(new, labels, strict=True)),
        bank=folder.file(BANK),
    )

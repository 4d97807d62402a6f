"""Stage 4, between clustering and choosing anchors: clusters fitted again by evidence.

Embeddings tell users apart as far as the embedding sees what differs between them. What decides in
the end is which LoRA answers a user's items best, so the clusters are fitted as a mixture of LoRAs,
by hard EM (Dempster, Laird & Rubin 1977; classification EM of Celeux & Govaert 1992). Round by
round, `anchors.refits` at most:

    M  each cluster's LoRA is trained on the first, third, ... item of its members, going on from
       the round before; clusters with fewer than `min_cluster_size` members are given up;
    E  each candidate goes to the cluster under whose LoRA the candidate's other items, which no
       LoRA has seen, are likeliest. HDBSCAN's noise is assigned like all others. The first round
       asks all clusters, later ones only those that were the candidate's NEAREST the round before:
       asking is most of the work, and hardly anybody moves farther.

It ends early when no more than one candidate in a hundred moves. Each round is a
stage: a run that was killed goes on from the last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.config.options import AnchorOptions, ComputeOptions, TrainingOptions
from tasks.config.task import derive_seed
from tasks.embed import read_embeddings
from tasks.files import sha256_of
from tasks.log import log
from tasks.method.clusters import cluster
from tasks.method.refit import assign, large_clusters, to_ask
from tasks.prepare import users_of
from tasks.record import File, key_of, library_versions
from tasks.results.models import Base, Clusters, Embedded, Questions
from tasks.results.rows import Rows
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.running.slots import gpu_slot
from tasks.text.loading import LIBRARIES, load
from tasks.text.tokens import tokens_of
from tasks.training import checkpoint, engine_of, train_loras

if TYPE_CHECKING:
    from tasks.lora.base import Base as LoadedBase
    from tasks.lora.batches import Encoded
    from tasks.lora.checkpoint import Checkpoint

BANK = "bank.safetensors"
CLUSTERS = "clusters.json"
SETTLED = 0.01
NEAREST = 4


def refitted_clusters(
    anchors: AnchorOptions,
    training: TrainingOptions,
    embedded: Embedded,
    candidates: File,
    questions: Questions,
    base: Base,
    seed: int,
    compute: ComputeOptions,
) -> Clusters | None:
    """The clusters after the last round; None where there is none to be made."""
    if not anchors.refits or anchors.train_on == "user":
        return None
    last: Clusters | None = None
    moved: list[int] = []
    how = training.model_copy(update={"epochs": anchors.refit_epochs})
    for number in range(anchors.refits):
        last = refit(
            anchors, how, embedded, candidates, questions, base, last, number, seed, compute
        )
        moved.append(last.moved)
        if moved[-1] <= SETTLED * len(last.clusters):
            break
    assert last is not None
    log(
        f"{len(set(last.clusters) - {-1})} clusters after {len(moved)} rounds; candidates that "
        f"moved in each: {', '.join(map(str, moved))}"
    )
    return last


@stage(version=3, libraries=(*LIBRARIES, "hdbscan", "scikit-learn", "numpy"), uses_model=True)
def refit(
    anchors: AnchorOptions,
    training: TrainingOptions,
    embedded: Embedded,
    candidates: File,
    questions: Questions,
    base: Base,
    before: Clusters | None,
    number: int,
    seed: int,
    compute: ComputeOptions,
) -> Clusters:
    """Round `number`, after the round `before`: the clusters of the candidates, in their order.

    It depends on neither the few-shot users nor the number of rounds, nor on which clusters become
    anchors; where only these changed it is found.
    """
    if before:
        labels = list(before.clusters)
    else:
        points = read_embeddings(embedded)["anchor"][1]
        labels = cluster(points, anchors, derive_seed(seed, "cluster"))
    large = large_clusters(labels, anchors.min_cluster_size)
    if not large:
        return Clusters(clusters=tuple(labels), nearest=(), moved=0, log_likelihood=None, bank=None)
    key = key_of(
        "refit", 4, library_versions(LIBRARIES), training, labels, large, candidates, questions,
        base, before, number, seed,
    )  # fmt: skip
    rows = Rows("refit", [key], _read)
    if not rows.missing:
        return rows.all()[0]
    users = users_of(candidates)
    # All candidates: the LoRAs of the round before had their say in who is in which cluster.
    everybody = [user["user_id"] for user in users]
    with (
        checkpoint(compute, "refit", key, everybody) as kept,
        rows.folder() as folder,
        gpu_slot(),
    ):
        loaded = load(base, compute)
        encoded = [list(own) for own in tokens_of(questions, base, loaded, "profile", users)]
        seeds = [derive_seed(seed, "refit", str(number), str(k)) for k in large]
        _round(
            folder.path, loaded, training, encoded, labels, large, before, seeds, kept, base.engine
        )  # fmt: skip
    return _read(folder.file())[0]


def _round(
    out: Path,
    loaded: LoadedBase,
    training: TrainingOptions,
    encoded: Sequence[list[Encoded]],
    labels: list[int],
    large: list[int],
    before: Clusters | None,
    seeds: list[int],
    kept: Checkpoint | None,
    engine: str,
) -> None:
    """Train the LoRAs of the clusters `large`, ask all candidates, and write what came of it."""
    import torch

    from tasks.lora.bank import read_bank, stack, write_bank

    names = [str(k) for k in large]
    shown = [
        [item for own, label in zip(encoded, labels, strict=True) if label == k
         for item in own[0::2]]
        for k in large
    ]  # fmt: skip
    earlier = read_bank(store().path(before.bank)) if before and before.bank else None
    initial = [earlier.lora(name) for name in names] if earlier else None
    loras, _ = train_loras(
        loaded, training, shown, seeds, initial=initial, checkpoint=kept, engine=engine
    )
    bank = stack(names, loras)
    held_out = [own[1::2] for own in encoded]
    asked = torch.ones(len(encoded), len(large), dtype=torch.bool)
    if before:
        asked = torch.tensor(to_ask(before.nearest, large))
    own = engine_of(engine)
    with own.grouped(loaded.model, list(bank.layers)) as layers:
        parts = [bank.of([k]).to(loaded.device) for k in range(len(names))]
        found = own.evidence(loaded, layers, held_out, parts, asked=asked)
    write_bank(out / BANK, bank)
    # A LoRA that gives no number is nobody's. Four decimals: company moves the last bits of a sum.
    table = found.double().nan_to_num(nan=-math.inf).numpy().round(4)
    new = assign(labels, table, [len(own) for own in held_out], large)
    order = (-table).argsort(axis=1, kind="stable")[:, :NEAREST]
    about = {
        "clusters": new,
        "nearest": [[large[k] for k in own] for own in order.tolist()],
        "moved": sum(one != other for one, other in zip(new, labels, strict=True)),
        "log_likelihood": float(table.max(axis=1).sum() / max(sum(map(len, held_out)), 1)),
    }
    (out / CLUSTERS).write_text(json.dumps(about))


def _read(folder: File) -> list[Clusters]:
    path = store().path(folder)
    bank = File(uri=f"{folder.uri}/{BANK}", sha256=sha256_of(path / BANK))
    return [Clusters.model_validate(json.loads((path / CLUSTERS).read_text()) | {"bank": bank})]

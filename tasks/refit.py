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

It ends early when no more than one candidate in a hundred moves. Each round is a piece of the
store: a run that was killed goes on from the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.anchors import clusters_of
from tasks.base_model import load, model_parts, prompt_parts
from tasks.config import RunConfig, derive_seed
from tasks.embedding import read_embeddings
from tasks.meta_lora import train_users
from tasks.prepare import users_of
from tasks.questions import content
from tasks.running.progress import Progress
from tasks.stage import gpu_slot, log, stage, store
from tasks.store.artifacts import Store
from tasks.store.checkpoints import checkpoint_of, remove
from tasks.store.pieces import Piece, digest
from tasks.tokens import tokens_of

if TYPE_CHECKING:
    import numpy as np

    from tasks.lora.batches import Encoded
    from tasks.lora.checkpoint import Checkpoint

VERSION = 2
SETTLED = 0.01
NEAREST = 4


@stage(name="refit", uses_model=True)
def refit(
    config: dict[str, Any],
    lamp_task: str,
    prepared: dict[str, Any],
    base: dict[str, Any],
    embedded: dict[str, Any],
) -> Piece:
    """The last round: `clusters`, a number per anchor candidate in their order (-1: noise).

    Also how many `moved` in it, and `log_likelihood`, the mean per held-out item.
    """
    options = RunConfig.model_validate(config)
    where = store()
    instruction = prepared["value"]["instruction"]
    users = users_of(where, prepared, "anchor")
    points = read_embeddings(where, embedded["ref"], options)["anchor"][1]
    labels = clusters_of(points, options.anchors, derive_seed(options.seed, "cluster"))
    shared = digest(
        {
            "version": VERSION,
            "lamp_task": lamp_task,
            "histories": [content(user["profile"]) for user in users],
            "start": labels,
            "training": options.meta_lora.model_dump(),
            "epochs": options.anchors.refit_epochs,
            "min_cluster_size": options.anchors.min_cluster_size,
            "seed": options.seed,
            **prompt_parts(options, instruction),
            **model_parts(options, base),
        }
    )

    @cache  # once for all rounds, and not at all where every round is known
    def samples() -> list[list[Encoded]]:
        loaded = load(options, where, base)
        found = tokens_of(options, where, lamp_task, instruction, base, loaded, "profile", users)
        return [list(own) for own in found]

    everybody = [user["user_id"] for user in users]
    progress = Progress("refit", f"{lamp_task}: clusters by evidence", options.anchors.refits)
    last: Piece | None = None
    moved: list[int] = []
    for number in range(options.anchors.refits):
        # A round depends on the one before it, which is in its key by its content.
        key = digest([shared, number, last.ref["sha256"] if last else None])
        # All candidates: the LoRAs of the round before had their say in who is in which cluster.
        keep = partial(checkpoint_of, options, where, "refit", key, everybody)
        make = partial(_round, options, where, base, samples, labels, last, number, keep)
        last = where.get("refit", key, make)
        remove(where, "refit", key)
        labels = last.value["clusters"]
        moved.append(last.value["moved"])
        progress.update(number + 1)
        if moved[-1] <= SETTLED * len(users):
            break
    assert last is not None  # the flow asks only where anchors.refits is 1 or more
    log(
        f"{lamp_task}: {len(set(labels) - {-1})} clusters after {len(moved)} rounds; candidates "
        f"that moved in each: {', '.join(map(str, moved))}"
    )
    return last


def _round(
    options: RunConfig,
    where: Store,
    base_result: dict[str, Any],
    samples: Callable[[], list[list[Encoded]]],
    labels: list[int],
    before: Piece | None,
    number: int,
    keep: Callable[[], Checkpoint | None],
    out: Path,
) -> dict[str, Any]:
    """`bank.safetensors`, the clusters' LoRAs, and the clusters of the candidates after it."""
    import torch

    from tasks.lora.answer import evidence
    from tasks.lora.bank import read_bank, stack, write_bank
    from tasks.lora.grouped import grouped

    kept = large_clusters(labels, options.anchors.min_cluster_size)
    if not kept:
        return {"clusters": labels, "nearest": [], "moved": 0, "log_likelihood": None}
    names = [str(k) for k in kept]
    with gpu_slot():
        base = load(options, where, base_result)
        encoded = samples()
        shown = [
            [item for own, label in zip(encoded, labels, strict=True) if label == k
             for item in own[0::2]]
            for k in kept
        ]  # fmt: skip
        recipe = options.meta_lora.model_copy(update={"epochs": options.anchors.refit_epochs})
        seeds = [derive_seed(options.seed, "refit", str(number), name) for name in names]
        earlier = read_bank(before.folder / "bank.safetensors") if before else None
        initial = [earlier.lora(name) for name in names] if earlier else None
        loras, _ = train_users(base, recipe, shown, seeds, initial=initial, checkpoint=keep())
        bank = stack(names, loras)
        held_out = [own[1::2] for own in encoded]
        asked = torch.ones(len(encoded), len(kept), dtype=torch.bool)
        if before:
            asked = torch.tensor(to_ask(before.value["nearest"], kept))
        with grouped(base.model, list(bank.layers)) as layers:
            anchors = [bank.parts(k, base.device) for k in range(len(names))]
            found = evidence(base, layers, held_out, anchors, asked=asked)
    write_bank(out / "bank.safetensors", bank)
    # A LoRA that gives no number is nobody's. Four decimals: company moves the last bits of a sum.
    table = found.double().nan_to_num(nan=-math.inf).numpy().round(4)
    new = assign(labels, table, [len(own) for own in held_out], kept)
    order = (-table).argsort(axis=1, kind="stable")[:, :NEAREST]
    return {
        "clusters": new,
        "nearest": [[kept[k] for k in own] for own in order.tolist()],
        "moved": sum(one != other for one, other in zip(new, labels, strict=True)),
        "log_likelihood": float(table.max(axis=1).sum() / max(sum(map(len, held_out)), 1)),
    }


def large_clusters(labels: list[int], size: int) -> list[int]:
    """The numbers, in order, of the clusters with `size` members or more; noise (-1) is none."""
    return [k for k in sorted(set(labels) - {-1}) if labels.count(k) >= size]


def to_ask(nearest: list[list[int]], clusters: list[int]) -> list[list[bool]]:
    """[U, K]: which of `clusters` each candidate is asked: the nearest that are left, or all."""
    return [
        [k in own for k in clusters] if set(own) & set(clusters) else [True] * len(clusters)
        for own in nearest
    ]


def assign(
    labels: list[int], evidence: np.ndarray, items: list[int], clusters: list[int]
) -> list[int]:
    """Each candidate's cluster by `evidence` [U, K] for `clusters` [K], the first of equals.

    A candidate without held-out `items` stays, or becomes noise where its cluster was given up.
    """
    import numpy as np

    best = np.argmax(evidence, axis=1)
    return [
        clusters[k] if count else label if label in clusters else -1
        for k, count, label in zip(best, items, labels, strict=True)
    ]

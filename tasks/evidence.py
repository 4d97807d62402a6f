"""Evidence for anchors: how likely a user's own items are under each anchor's LoRA.

log p(items of u | anchor k), summed over the items' answers, is what Bayesian model averaging over
the bank weighs its members by (docs/method.md, Fusion). It costs one pass of the items per anchor
and no training; where the bank is large, `fusion.shortlist` narrows it to the most similar anchors.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.config.options import ComputeOptions
from tasks.log import log
from tasks.prepare import users_in_order
from tasks.record import File, key_of, library_versions
from tasks.results.models import Bank, Base, Questions
from tasks.results.rows import Rows
from tasks.results.store import store
from tasks.running.slots import gpu_slot
from tasks.text.loading import LIBRARIES, load
from tasks.text.questions import Item, content
from tasks.text.tokens import tokens_of
from tasks.training import engine_of

if TYPE_CHECKING:
    import numpy as np

TABLE = "evidence.parquet"


@dataclass(frozen=True)
class Evidence:
    """log_likelihoods [U, K], NaN off the shortlist; seconds per user."""

    log_likelihoods: np.ndarray
    seconds: list[float]


def evidence_of(
    users: File,
    ids: Sequence[str],
    asked: np.ndarray,
    bank: Bank,
    questions: Questions,
    base: Base,
    compute: ComputeOptions,
) -> Evidence:
    """The evidence of each few-shot user for the anchors `asked` [U, K], in the bank's order.

    A user whose history and anchors did not change is taken from an earlier table.
    """
    import numpy as np
    import polars as pl

    profiles = [user["profile"] for user in users_in_order(users, ids)]
    hashes = [member.adapter.sha256 for member in bank.members]
    shared = key_of("evidence", 2, library_versions(LIBRARIES), questions, base)
    keys = [
        key_of(shared, content(profile), [sha if ask else None for sha, ask in zip(hashes, own,
               strict=True)])
        for profile, own in zip(profiles, asked.tolist(), strict=True)
    ]  # fmt: skip

    rows = Rows("evidence", keys, _read)
    if rows.missing:
        log(f"evidence for {len(hashes)} anchors of {rows.counted()}")
        with gpu_slot():
            started = time.perf_counter()
            chosen = [profiles[number] for number in rows.missing]
            table = _asked(questions, base, bank, chosen, asked[rows.missing], compute)
            each = round((time.perf_counter() - started) / len(chosen), 4)
        rows.add([(row, each) for row in table.tolist()])
    likelihoods, seconds = [row for row, _ in rows.all()], [one for _, one in rows.all()]
    with rows.folder() as folder:
        columns = {"user_id": list(ids), "log_likelihoods": likelihoods, "seconds": seconds}
        kinds = {"log_likelihoods": pl.List(pl.Float64)}
        pl.DataFrame(columns, schema_overrides=kinds).write_parquet(folder.path / TABLE)
    return Evidence(np.array(likelihoods, dtype=float), seconds)


def _read(folder: File) -> list[tuple[list[float], float]]:
    import polars as pl

    table = pl.read_parquet(store().path(folder) / TABLE)
    return list(table.select("log_likelihoods", "seconds").iter_rows())


def _asked(
    questions: Questions,
    base: Base,
    bank: Bank,
    profiles: Sequence[Sequence[Item]],
    asked: np.ndarray,
    compute: ComputeOptions,
) -> np.ndarray:
    """Log-likelihoods [U, K] of the profiles' items, NaN where not asked."""
    import numpy as np
    import torch

    from tasks.lora.bank import read_bank

    loaded = load(base, compute)
    users = [{"profile": profile} for profile in profiles]
    samples = [list(own) for own in tokens_of(questions, base, loaded, "profile", users)]
    loras = read_bank(store().path(bank.file))
    # One at a time: a large bank need not fit on the device.
    anchors = (loras.of([k]).to(loaded.device) for k in range(len(loras.ids)))
    own = engine_of(base.engine)
    with own.grouped(loaded.model, list(loras.layers)) as layers:
        table = own.evidence(loaded, layers, samples, anchors, asked=torch.from_numpy(asked))
    # Four decimals: the company of other users moves the last bits of a sum.
    return np.round(table.double().numpy(), 4)

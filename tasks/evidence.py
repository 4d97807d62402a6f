"""Evidence for anchors: how likely a user's own items are under each anchor's LoRA.

log p(items of u | anchor k), summed over the items' answers, is what Bayesian model averaging over
the bank weighs its members by. It costs one pass of the items per anchor and no training; where
the bank is large, `fusion.shortlist` narrows it to the most similar anchors first.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.base_model import load, model_parts, prompt_parts
from tasks.config import RunConfig
from tasks.prepare import users_of
from tasks.questions import content
from tasks.similarity import unit_vectors
from tasks.stage import gpu_slot, log, stage, store
from tasks.store.artifacts import Store
from tasks.store.pieces import NOTES, Piece, digest
from tasks.tokens import tokens_of

if TYPE_CHECKING:
    import numpy as np

VERSION = 1


@stage(name="evidence", uses_model=True)
def evidence(
    config: dict[str, Any],
    lamp_task: str,
    prepared: dict[str, Any],
    base: dict[str, Any],
    embedded: dict[str, Any],
    banked: dict[str, Any],
) -> Piece:
    """`evidence.parquet`: user_id and log_likelihoods [K], null for anchors off the shortlist.

    K in the bank's order, one row per few-shot user. A user whose history and anchors did not
    change is taken from an earlier table.
    """
    import numpy as np

    options = RunConfig.model_validate(config)
    where = store()
    instruction = prepared["value"]["instruction"]
    users = {user["user_id"]: user for user in users_of(where, prepared, "few_shot")}
    ids, few_shot, bank = unit_vectors(options, where, embedded, banked)
    anchors = banked["value"]["ids"]
    # Rounded, so that company, which moves the last bits, moves nobody in or out.
    asked = shortlists(np.round(few_shot @ bank.T, 6), options.fusion.shortlist)
    hashes = [banked["value"]["members"][anchor] for anchor in anchors]
    rows = [
        digest(
            {
                "version": VERSION,
                "lamp_task": lamp_task,
                "history": content(users[user_id]["profile"]),
                "bank": [sha if ask else None for sha, ask in zip(hashes, own, strict=True)],
                **prompt_parts(options, instruction),
                **model_parts(options, base),
            }
        )
        for user_id, own in zip(ids, asked, strict=True)
    ]

    def make(out: Path) -> dict[str, Any]:
        import polars as pl

        known = _known(where, rows)
        todo = [number for number, row in enumerate(rows) if row not in known]
        log(
            f"{lamp_task}: evidence of {len(todo)} users for {len(anchors)} anchors, "
            f"{len(rows) - len(todo)} known from before"
        )
        if todo:
            with gpu_slot():
                started = time.perf_counter()
                profiles = [users[ids[number]]["profile"] for number in todo]
                table = _evidence(
                    options, lamp_task, where, base, banked, instruction, profiles, asked[todo]
                )
                each = round((time.perf_counter() - started) / len(todo), 4)
            known |= {
                rows[number]: ([None if np.isnan(x) else x for x in own], each)
                for number, own in zip(todo, table.tolist(), strict=True)
            }
        found = [known[row] for row in rows]
        columns = {"user_id": ids, "log_likelihoods": [own for own, _ in found]}
        kinds = {"log_likelihoods": pl.List(pl.Float64)}
        pl.DataFrame(columns, schema_overrides=kinds).write_parquet(out / "evidence.parquet")
        return {"rows": rows, "anchors": anchors, NOTES: {"per_user": [s for _, s in found]}}

    return where.get("evidence", digest([ids, anchors, rows]), make, rows)


def shortlists(cosines: np.ndarray, size: int | None) -> np.ndarray:
    """[U, K], True for each user's `size` most similar anchors (all where it is None)."""
    import numpy as np

    if size is None or size >= cosines.shape[1]:
        return np.ones(cosines.shape, dtype=bool)
    chosen = np.zeros(cosines.shape, dtype=bool)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :size]
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen


def read_evidence(where: Store, weighed: dict[str, Any]) -> np.ndarray:
    """[U, K] log-likelihoods of an `evidence` result, NaN off the shortlist."""
    import numpy as np
    import polars as pl

    table = pl.read_parquet(where.open(weighed["ref"]).folder / "evidence.parquet")
    flat = table["log_likelihoods"].explode().to_numpy().astype(np.float64)
    return flat.reshape(len(table), len(weighed["value"]["anchors"]))


def _known(where: Store, rows: list[str]) -> dict[str, tuple[list[float | None], float]]:
    import polars as pl

    found = where.find_rows("evidence", rows)
    tables = {
        piece.folder: pl.read_parquet(piece.folder / "evidence.parquet")["log_likelihoods"]
        for piece, _ in found.values()
    }
    return {
        row: (tables[piece.folder][number].to_list(), piece.notes["per_user"][number])
        for row, (piece, number) in found.items()
    }


def _evidence(
    options: RunConfig,
    lamp_task: str,
    where: Store,
    base_result: dict[str, Any],
    banked: dict[str, Any],
    instruction: str,
    profiles: list[list[dict[str, str]]],
    asked: np.ndarray,
) -> np.ndarray:
    """Log-likelihoods [U, K] of the profiles' items, NaN where not asked."""
    import numpy as np
    import torch

    from tasks.lora.answer import evidence as log_evidence
    from tasks.lora.bank import read_bank
    from tasks.lora.grouped import grouped

    base = load(options, where, base_result)
    users = [{"profile": profile} for profile in profiles]
    found = tokens_of(options, where, lamp_task, instruction, base_result, base, "profile", users)
    samples = [list(own) for own in found]
    bank = read_bank(where.open(banked["ref"]).folder / "bank.safetensors")
    # One at a time: a large bank need not fit on the device.
    anchors = (bank.parts(k, base.device) for k in range(len(bank.ids)))
    with grouped(base.model, list(bank.layers)) as layers:
        table = log_evidence(base, layers, samples, anchors, asked=torch.from_numpy(asked))
    # Four decimals: the company of other users moves the last bits of a sum.
    return np.round(table.double().numpy(), 4)

"""Stage 3: one vector per user, from the user's history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.artifacts import Piece, Ref, Store, digest, library_versions
from tasks.base_model import (
    HUB_FILES,
    LIBRARIES,
    load,
    model_parts,
    prompt_parts,
    unload,
    use_threads,
)
from tasks.config import RunConfig, derive_seed
from tasks.errors import InputError
from tasks.lamp.definitions import get_task
from tasks.prepare import ROLES, users_of
from tasks.questions import content
from tasks.stage import Progress, gpu_slot, log, stage, store
from tasks.tokens import tokens_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tasks.lora.base import Base
    from tasks.lora.batches import Encoded

Item = TypeVar("Item")
Profile = list[dict[str, str]]

VERSION = 3
# `anchors.text_model` of this name: no encoder but the base model.
OWN_MODEL = "base"
# Users embedded at once, between two reports of progress.
CHUNK = 20


@stage(name="embed", tags=["gpu"])
def embed(
    config: dict[str, Any], lamp_task: str, prepared: dict[str, Any], base: dict[str, Any]
) -> Piece:
    """`embeddings.parquet`: role, user_id, vector [D] (float32), one row per user of any role.

    A user whose history did not change is taken from an earlier table, whatever became of others.
    """
    options = RunConfig.model_validate(config)
    where = store()
    instruction = prepared["value"]["instruction"]
    users = [(role, user) for role in ROLES for user in users_of(where, prepared, role)]
    shared = digest(
        {
            "version": VERSION,
            "lamp_task": lamp_task,
            **_method(options, base, instruction, where),
        }
    )
    rows = [digest([shared, content(user["profile"])]) for _, user in users]
    key = digest([[role, user["user_id"]] for role, user in users] + rows)

    def make(out: Path) -> dict[str, Any]:
        import numpy as np
        import polars as pl

        known = _known(where, rows)
        todo = [index for index, row in enumerate(rows) if row not in known]
        log(f"{lamp_task}: embedding {len(todo)} users, {len(rows) - len(todo)} known from before")
        profiles = [users[index][1]["profile"] for index in todo]
        if options.anchors.embedding == "signature":
            made = _signatures(options, lamp_task, instruction, profiles, where, base)
        elif options.anchors.text_model == OWN_MODEL:
            made = _own_states(options, lamp_task, profiles, where, base)
        else:
            made = _texts(options, lamp_task, profiles)
        known |= dict(zip((rows[index] for index in todo), made, strict=True))
        table = {
            "role": [role for role, _ in users],
            "user_id": [user["user_id"] for _, user in users],
            "vector": pl.Series(
                np.stack([known[row] for row in rows]).astype(np.float32)
            ).arr.to_list(),
        }
        pl.DataFrame(table).write_parquet(out / "embeddings.parquet")
        return {"rows": rows, "users": len(rows), "dimensions": len(known[rows[0]])}

    return where.get("embedding", key, make)


def read_embeddings(
    where: Store, ref: Ref, options: RunConfig
) -> dict[str, tuple[list[str], np.ndarray]]:
    """role -> (user ids, unit vectors [U, D]).

    Signatures are centred first: raw ones all point along the population's mean, and their
    cosines differ in the third decimal. The centre is that of the base users (the anchor
    candidates where there are none), so that one user's new item moves that user only.
    """
    import numpy as np
    import polars as pl

    table = pl.read_parquet(where.open(ref).folder / "embeddings.parquet")
    parts = {}
    dimensions = len(table["vector"][0])
    for role in ROLES:
        part = table.filter(pl.col("role") == role)
        # Not through Python lists: thousands of users times thousands of numbers.
        flat = part["vector"].explode().to_numpy().astype(np.float64)
        parts[role] = (part["user_id"].to_list(), flat.reshape(len(part), dimensions))
    if options.anchors.embedding == "signature":
        population = parts["base"][1] if len(parts["base"][0]) else parts["anchor"][1]
        centre = population.mean(0)
        parts = {role: (ids, v - centre if len(ids) else v) for role, (ids, v) in parts.items()}
    for ids, vectors in parts.values():
        if ids:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return parts


def _method(
    options: RunConfig, base: dict[str, Any], instruction: str, where: Store
) -> dict[str, Any]:
    """What decides a vector besides the history."""
    if options.anchors.embedding == "signature":
        sizes = [options.anchors.signature_vocabulary, options.anchors.signature_hidden]
        return {
            "signature": sizes,
            "seed": options.seed,
            **prompt_parts(options, instruction),
            **model_parts(options, base),
        }
    if options.anchors.text_model == OWN_MODEL:
        return {"text": OWN_MODEL, **model_parts(options, base)}
    folder = Path(options.anchors.text_model).expanduser()
    model = (
        where.hash_folder(folder, [*HUB_FILES, *(f"*/{name}" for name in HUB_FILES)])
        if folder.is_dir()
        else options.anchors.text_model
    )
    try:
        libraries = library_versions(("sentence-transformers", *LIBRARIES))
    except PackageNotFoundError as error:
        raise InputError(
            "anchors.embedding: text needs the extra `text` (pip install -e '.[text]'), "
            "or use signature"
        ) from error
    return {"text": model, "libraries": libraries}


def _known(where: Store, rows: list[str]) -> dict[str, np.ndarray]:
    import polars as pl

    found = where.find_rows("embedding", rows)
    tables: dict[Path, np.ndarray] = {}
    for piece, _ in found.values():
        if piece.folder not in tables:
            vectors = pl.read_parquet(piece.folder / "embeddings.parquet")["vector"]
            # Not through Python lists: thousands of users times thousands of numbers.
            tables[piece.folder] = vectors.explode().to_numpy().reshape(len(vectors), -1)
    return {row: tables[piece.folder][number] for row, (piece, number) in found.items()}


def _signatures(
    options: RunConfig,
    lamp_task: str,
    instruction: str,
    profiles: list[Profile],
    where: Store,
    base_result: dict[str, Any],
) -> list[np.ndarray]:
    from tasks.lora.signature import item_signatures

    def samples(base: Base) -> Sequence[Sequence[Encoded]]:
        users = [{"profile": own} for own in profiles]
        return tokens_of(
            options, where, lamp_task, instruction, base_result, base, "profile", users
        )

    def items(base: Base, part: Sequence[Sequence[Encoded]]) -> Tensor:
        return item_signatures(
            base,
            list(chain(*part)),
            options.anchors.signature_vocabulary,
            options.anchors.signature_hidden,
            derive_seed(options.seed, "signature"),
        )

    title = f"{lamp_task}: signatures of users"
    return _means_of_items(options, title, len(profiles), where, base_result, samples, items)


def _own_states(
    options: RunConfig,
    lamp_task: str,
    profiles: list[Profile],
    where: Store,
    base_result: dict[str, Any],
) -> list[np.ndarray]:
    """As `_texts`, with the base model itself as the encoder: mean over tokens, then items."""
    from tasks.lora.batches import Encoded
    from tasks.lora.signature import mean_states

    task = get_task(lamp_task)

    def items(base: Base, part: Sequence[Sequence[dict[str, str]]]) -> Tensor:
        texts = [task.whole(item["text"], item["answer"]) for own in part for item in own]
        ids = base.tokenizer(texts, split_special_tokens=True)["input_ids"]
        return mean_states(base, [Encoded(one[: base.max_tokens], []) for one in ids])

    title = f"{lamp_task}: embeddings of users"
    return _means_of_items(
        options, title, len(profiles), where, base_result, lambda _base: profiles, items
    )


def _means_of_items(
    options: RunConfig,
    title: str,
    users: int,
    where: Store,
    base_result: dict[str, Any],
    given: Callable[[Base], Sequence[Sequence[Item]]],
    items: Callable[[Base, Sequence[Sequence[Item]]], Tensor],
) -> list[np.ndarray]:
    """Each user's mean over the vectors [N, D] that `items` makes of some users' items, in order.

    given: every user's items. Many users in one call: single ones are small batches. Each item is
    its own row.
    """
    progress = Progress("embed", title, users)
    vectors: list[np.ndarray] = []
    with gpu_slot():
        base = load(options, where, base_result)
        everyone = given(base)
        for start in range(0, users, CHUNK):
            part = everyone[start : start + CHUNK]
            split = items(base, part).split([len(own) for own in part])
            vectors += [own.mean(0).numpy() for own in split]
            progress.update(len(vectors))
        # This stage runs in the flow's own thread; the jobs after it run in others.
        unload()
    return vectors


def _texts(options: RunConfig, lamp_task: str, profiles: list[Profile]) -> list[np.ndarray]:
    """Mean over items of the encoder's vector of the item's text and answer (METHOD, stage 1)."""
    from sentence_transformers import SentenceTransformer

    try:
        encoder = SentenceTransformer(
            options.anchors.text_model,
            device=None if options.compute.device == "auto" else options.compute.device,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(
            f"anchors.text_model {options.anchors.text_model}: cannot be loaded ({why}); "
            "give a sentence-transformers id or folder, or `base` for the base model's own states"
        ) from error
    task = get_task(lamp_task)
    texts = [task.whole(item["text"], item["answer"]) for own in profiles for item in own]
    use_threads(options)
    with gpu_slot():
        items = encoder.encode(texts, batch_size=64, show_progress_bar=False, convert_to_numpy=True)
    vectors, start = [], 0
    for profile in profiles:
        vectors.append(items[start : start + len(profile)].mean(0))
        start += len(profile)
    return vectors

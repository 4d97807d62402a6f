"""Stage 3: one vector per user, from the user's history."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.base_model import LIBRARIES, load, model_parts, prompt_parts, unload
from tasks.config import RunConfig, derive_seed
from tasks.errors import InputError
from tasks.lamp.definitions import get_task
from tasks.prepare import ROLES, each_user
from tasks.questions import content
from tasks.running.progress import Progress
from tasks.stage import gpu_slot, log, stage, store
from tasks.store.artifacts import Store
from tasks.store.pieces import Piece, Ref, digest, library_versions
from tasks.text_encoder import Profile, encoder_folder, encoder_hash, text_vectors
from tasks.tokens import tokens_of
from tasks.whitening import (
    WHITENED,
    WHITENING_FILE,
    read_whitening,
    whitening,
    write_whitening,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tasks.lora.base import Base
    from tasks.lora.batches import Encoded

Item = TypeVar("Item")
User = TypeVar("User")

VERSION = 4
# `anchors.text_model` of this name: no encoder but the base model.
OWN_MODEL = "base"
# Users embedded at once, between two reports of progress.
CHUNK = 20
# Embeddings by gradients of the base model.
SIGNATURES = ("signature", "input_signature")


@stage(name="embed", uses_model=True)
def embed(
    config: dict[str, Any], lamp_task: str, prepared: dict[str, Any], base: dict[str, Any]
) -> Piece:
    """`embeddings.parquet`: role, user_id, vector [D] (float32), one row per user (`roles_of`).

    A user whose history did not change is taken from an earlier table, whatever became of others.
    """
    options = RunConfig.model_validate(config)
    where = store()
    instruction = prepared["value"]["instruction"]
    method = _method(options, base, instruction, where)
    shared = digest({"version": VERSION, "lamp_task": lamp_task, **method})
    users: list[tuple[str, str]] = []
    rows: list[str] = []
    for role in roles_of(options):
        for user in each_user(where, prepared, role):
            users.append((role, user["user_id"]))
            rows.append(digest([shared, content(user["profile"])]))
    key = digest([[role, user_id] for role, user_id in users] + rows)
    # The base users stand first, or the candidates where there are none.
    teachers = [user for user in users if user[0] == users[0][0]][:WHITENED]
    # Kept as one row more: it changes with them alone.
    taught = [digest([shared, "whitening", rows[: len(teachers)]])] if _at_input(options) else []

    def parts(chosen: _Users) -> Iterator[list[Profile]]:
        profiles = (user["profile"] for user in chosen)
        return _parts(profiles, len(chosen.names), f"{lamp_task}: embeddings of users")

    def make(out: Path) -> dict[str, Any]:
        import numpy as np
        import polars as pl

        known = _known(where, rows)
        todo = [index for index, row in enumerate(rows) if row not in known]
        log(f"{lamp_task}: embedding {len(todo)} users, {len(rows) - len(todo)} known from before")
        chosen = _Users(where, prepared, [users[index] for index in todo])
        if options.anchors.embedding in SIGNATURES:
            made = _means(_signatures(options, lamp_task, instruction, chosen, where, base))
        elif options.anchors.text_model == OWN_MODEL:
            made = _means(_own_states(options, lamp_task, parts(chosen), where, base))
        else:
            made = text_vectors(options, lamp_task, parts(chosen), where, method["text"])
        known |= dict(zip((rows[index] for index in todo), made, strict=True))
        table = {
            "role": [role for role, _ in users],
            "user_id": [user_id for _, user_id in users],
            "vector": pl.Series(
                np.stack([known[row] for row in rows]).astype(np.float32)
            ).arr.to_list(),
        }
        pl.DataFrame(table).write_parquet(out / "embeddings.parquet")
        if taught:
            earlier = where.find_rows("embedding", taught)
            if earlier:
                shutil.copyfile(earlier[taught[0]][0].folder / WHITENING_FILE, out / WHITENING_FILE)
            else:
                named = _Users(where, prepared, teachers)
                items = _signatures(options, lamp_task, instruction, named, where, base)
                matrix = whitening(own.numpy() for own in items)
                write_whitening(out / WHITENING_FILE, matrix)
        return {"rows": rows + taught, "users": len(rows), "dimensions": len(known[rows[0]])}

    return where.get("embedding", key, make, rows + taught)


def _at_input(options: RunConfig) -> bool:
    """Whether signatures are those at the model's input, which are whitened."""
    return options.anchors.embedding == "input_signature"


def _means(vectors: Iterable[Tensor]) -> list[np.ndarray]:
    """Each user's mean [D] over the user's items [N, D]."""
    return [items.mean(0).numpy() for items in vectors]


def roles_of(options: RunConfig) -> tuple[str, ...]:
    """Whose users are embedded: base users are there for the centre, which texts have not."""
    return ROLES if options.anchors.embedding in SIGNATURES else ("anchor", "few_shot")


@dataclass(frozen=True)
class _Users:
    """Some users (role, id) in the order of the tables, which are read whenever they are gone
    through: together they may be gigabytes."""

    where: Store
    prepared: dict[str, Any]
    names: list[tuple[str, str]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        wanted = set(self.names)
        for role in dict.fromkeys(role for role, _ in self.names):
            for user in each_user(self.where, self.prepared, role):
                if (role, user["user_id"]) in wanted:
                    yield user


def _parts(users: Iterable[User], count: int, title: str) -> Iterator[list[User]]:
    """All `count` users, CHUNK at a time."""
    progress = Progress("embed", title, count)
    left, done = iter(users), 0
    while part := list(islice(left, CHUNK)):
        yield part
        done += len(part)
        progress.update(done)


def read_embeddings(
    where: Store, ref: Ref, options: RunConfig
) -> dict[str, tuple[list[str], np.ndarray]]:
    """role -> (user ids, unit vectors [U, D]).

    Signatures are centred first: raw ones all point along the population's mean, and their
    cosines differ in the third decimal. The centre is that of the base users (the anchor
    candidates where there are none), so that one user's new item moves that user only. Those at the
    input are then whitened (tasks/whitening.py).
    """
    import numpy as np
    import polars as pl

    folder = where.open(ref).folder
    table = pl.read_parquet(folder / "embeddings.parquet")
    parts = {}
    dimensions = len(table["vector"][0])
    for role in roles_of(options):
        part = table.filter(pl.col("role") == role)
        # Not through Python lists: thousands of users times thousands of numbers.
        flat = part["vector"].explode().to_numpy().astype(np.float64)
        parts[role] = (part["user_id"].to_list(), flat.reshape(len(part), dimensions))
    if options.anchors.embedding in SIGNATURES:
        population = parts["base"][1] if len(parts["base"][0]) else parts["anchor"][1]
        centre = population.mean(0)
        parts = {role: (ids, v - centre if len(ids) else v) for role, (ids, v) in parts.items()}
    if _at_input(options):
        matrix = read_whitening(folder / WHITENING_FILE)
        parts = {role: (ids, v @ matrix if len(ids) else v) for role, (ids, v) in parts.items()}
    for ids, vectors in parts.values():
        if ids:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return parts


def _method(
    options: RunConfig, base: dict[str, Any], instruction: str, where: Store
) -> dict[str, Any]:
    """What decides a vector besides the history."""
    if options.anchors.embedding in SIGNATURES:
        sizes = [options.anchors.signature_vocabulary, options.anchors.signature_hidden]
        return {
            options.anchors.embedding: sizes,
            "seed": options.seed,
            **prompt_parts(options, instruction),
            **model_parts(options, base),
        }
    if options.anchors.text_model == OWN_MODEL:
        return {"text": OWN_MODEL, **model_parts(options, base)}
    try:
        libraries = library_versions(("sentence-transformers", *LIBRARIES))
    except PackageNotFoundError as error:
        raise InputError(
            "anchors.embedding: text needs the extra `text` (pip install -e '.[text]'), "
            "or use signature"
        ) from error
    folder = encoder_folder(options.anchors.text_model)
    return {"text": encoder_hash(where, folder), "libraries": libraries}


def _known(where: Store, rows: list[str]) -> dict[str, np.ndarray]:
    import polars as pl

    found = where.find_rows("embedding", rows)
    tables: dict[Path, np.ndarray] = {}
    for piece, _ in found.values():
        if piece.folder not in tables:
            vectors = pl.read_parquet(piece.folder / "embeddings.parquet")["vector"]
            tables[piece.folder] = vectors.explode().to_numpy().reshape(len(vectors), -1)
    return {row: tables[piece.folder][number] for row, (piece, number) in found.items()}


def _signatures(
    options: RunConfig,
    lamp_task: str,
    instruction: str,
    users: _Users,
    where: Store,
    base_result: dict[str, Any],
) -> Iterator[Tensor]:
    from tasks.lora.signature import input_signatures, item_signatures

    sign = input_signatures if _at_input(options) else item_signatures

    def samples(base: Base) -> Iterable[Sequence[Sequence[Encoded]]]:
        tokens = tokens_of(
            options, where, lamp_task, instruction, base_result, base, "profile", users
        )
        return _parts(tokens, len(tokens), f"{lamp_task}: signatures of users")

    def items(base: Base, part: Sequence[Sequence[Encoded]]) -> Tensor:
        return sign(
            base,
            list(chain(*part)),
            options.anchors.signature_vocabulary,
            options.anchors.signature_hidden,
            derive_seed(options.seed, "signature"),
        )

    return _vectors_of_items(options, where, base_result, samples, items)


def _own_states(
    options: RunConfig,
    lamp_task: str,
    parts: Iterable[Sequence[Profile]],
    where: Store,
    base_result: dict[str, Any],
) -> Iterator[Tensor]:
    """The vectors of each user's texts by the base model itself: mean over tokens."""
    from tasks.lora.batches import Encoded
    from tasks.lora.signature import mean_states

    task = get_task(lamp_task)

    def items(base: Base, part: Sequence[Sequence[dict[str, str]]]) -> Tensor:
        texts = [task.whole(item["text"], item["answer"]) for own in part for item in own]
        ids = base.tokenizer(texts, split_special_tokens=True)["input_ids"]
        return mean_states(base, [Encoded(one[: base.max_tokens], []) for one in ids])

    return _vectors_of_items(options, where, base_result, lambda _base: parts, items)


def _vectors_of_items(
    options: RunConfig,
    where: Store,
    base_result: dict[str, Any],
    given: Callable[[Base], Iterable[Sequence[Sequence[Item]]]],
    items: Callable[[Base, Sequence[Sequence[Item]]], Tensor],
) -> Iterator[Tensor]:
    """The vectors [N, D] that `items` makes of each user's items, user by user, in order.

    given: the items of every user, some users at a time: single ones are small batches. Each item
    is its own row.
    """
    with gpu_slot():
        base = load(options, where, base_result)
        for part in given(base):
            yield from items(base, part).split([len(own) for own in part])
        # This stage runs in the flow's own thread; the jobs after it run in others.
        unload()

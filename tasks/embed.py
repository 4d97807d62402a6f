"""Stage 3: one vector per user, from the user's history.

`signature` and `input_signature` are gradients of the user's answers at the base model's output and
input (tasks/lora/signature.py), `text` the mean vector of the items' texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.config.options import ComputeOptions, EmbeddingOptions
from tasks.config.task import MethodConfig, derive_seed
from tasks.lamp.definitions import LampTask
from tasks.log import log
from tasks.method.whitening import unit_rows, whitening
from tasks.prepare import ROLES, each_user
from tasks.record import File, Record, key_of
from tasks.results.models import Base, Embedded, Prepared, Questions
from tasks.results.rows import Rows
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.running.progress import Progress
from tasks.running.slots import gpu_slot
from tasks.text.encoder import Encoder, encoder_of, text_vectors
from tasks.text.loading import LIBRARIES, load, unload
from tasks.text.questions import content
from tasks.text.tokens import tokens_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tasks.lora.base import Base as LoadedBase
    from tasks.lora.batches import Encoded

Item = TypeVar("Item")
T = TypeVar("T")

# `anchors.text_model` of this name: no encoder but the base model.
OWN_MODEL = "base"
# Users embedded at once, between two reports of progress.
CHUNK = 20
# Embeddings by gradients of the base model.
SIGNATURES = ("signature", "input_signature")
TABLE = "embeddings.parquet"
WHITENING_FILE = "whitening.safetensors"
# So many users of the population teach the whitening: their items are thousands.
WHITENED = 100


class Population(Record):
    """Whose users are embedded: the tables of these roles."""

    roles: tuple[str, ...]
    tables: tuple[File, ...]


class Embedding(Record):
    """What decides a vector besides the history.

    questions, seed: of signatures. encoder: of texts; without one the base model embeds.
    """

    options: EmbeddingOptions
    seed: int | None = None
    task: LampTask
    base: Base | None = None
    questions: Questions | None = None
    encoder: Encoder | None = None


def embedded_users(
    config: MethodConfig, users: Prepared, questions: Questions, base: Base,
    compute: ComputeOptions,
) -> Embedded:  # fmt: skip
    """The vectors of a method's users. Raises InputError where there is no such text encoder."""
    options = EmbeddingOptions.of(config.anchors)
    signed = options.embedding in SIGNATURES
    encoder = None
    if not signed and options.text_model != OWN_MODEL:
        encoder = encoder_of(options.text_model)
    # Base users are there for the centre, which texts have not.
    roles = roles_of(options)
    method = Embedding(
        # By what name it was asked for decides nothing: `encoder` has its content.
        options=options.model_copy(update={"text_model": OWN_MODEL}),
        seed=config.seed if signed else None,
        task=users.task,
        base=None if encoder else base,
        questions=questions if signed else None,
        encoder=encoder,
    )
    tables = tuple(users.side(role) for role in roles)
    return embed(method, Population(roles=roles, tables=tables), compute)


def roles_of(options: EmbeddingOptions) -> tuple[str, ...]:
    """Whose users are embedded."""
    return ROLES if options.embedding in SIGNATURES else ("anchor", "few_shot")


@stage(version=5, libraries=(*LIBRARIES, "numpy"), uses_model=True)
def embed(method: Embedding, population: Population, compute: ComputeOptions) -> Embedded:
    """The users' vectors; a user whose history did not change is taken from an earlier table."""
    import numpy as np
    import polars as pl

    shared = key_of(embed.identity, method)
    names: list[tuple[str, str]] = []
    keys: list[str] = []
    for role, table in zip(population.roles, population.tables, strict=True):
        for user in each_user(table):
            names.append((role, user["user_id"]))
            keys.append(key_of(shared, content(user["profile"])))

    rows = Rows("embed", keys, _read_rows)
    if rows.missing:
        log(f"embedding {rows.counted()}")
        chosen = _Users(population, [names[number] for number in rows.missing])
        rows.add(_vectors(method, chosen, compute))
    vectors = rows.all()
    whitened = method.options.embedding == "input_signature"
    with rows.folder() as folder:
        pl.DataFrame(
            {
                "role": [role for role, _ in names],
                "user_id": [user_id for _, user_id in names],
                "vector": pl.Series(np.stack(vectors).astype(np.float32)).arr.to_list(),
            }
        ).write_parquet(folder.path / TABLE)
        if whitened:
            # The base users stand first, or the candidates where there are none.
            first = [number for number, name in enumerate(names) if name[0] == names[0][0]]
            teachers = first[:WHITENED]
            matrix = _whitening(
                method, _Users(population, [names[n] for n in teachers]),
                key_of("whitening", shared, [keys[n] for n in teachers]), compute,
            )  # fmt: skip
            write_whitening(folder.path / WHITENING_FILE, matrix)
    return Embedded(
        table=folder.file(TABLE),
        whitening=folder.file(WHITENING_FILE) if whitened else None,
        centred=method.options.embedding in SIGNATURES,
        users=len(keys),
        dimensions=len(vectors[0]),
    )


@dataclass(frozen=True)
class _Users:
    """Some users (role, id) in the order of the tables, which are read whenever they are gone
    through: together they may be gigabytes."""

    population: Population
    names: list[tuple[str, str]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        wanted = set(self.names)
        for role, table in zip(self.population.roles, self.population.tables, strict=True):
            if any(name[0] == role for name in self.names):
                for user in each_user(table):
                    if (role, user["user_id"]) in wanted:
                        yield user


def _vectors(method: Embedding, users: _Users, compute: ComputeOptions) -> list[np.ndarray]:
    """One vector [D] per user: the mean over the user's items."""
    if method.questions:
        return [items.mean(0).numpy() for items in _signatures(method, users, compute)]
    profiles = (user["profile"] for user in users)
    parts = _parts(profiles, len(users.names), f"{method.task.name}: embeddings of users")
    if method.encoder:
        return text_vectors(method.encoder, method.task, parts, compute)
    return [items.mean(0).numpy() for items in _own_states(method, parts, compute)]


def _whitening(method: Embedding, users: _Users, key: str, compute: ComputeOptions) -> np.ndarray:
    """The matrix that these users teach, kept as a row of its own: it changes with them alone."""

    def read(folder: File) -> list[np.ndarray]:
        return [read_whitening(store().path(folder) / WHITENING_FILE)]

    rows = Rows("whitening", [key], read)
    if rows.missing:
        matrix = whitening(own.numpy() for own in _signatures(method, users, compute))
        rows.add([matrix])
        with rows.folder() as folder:
            write_whitening(folder.path / WHITENING_FILE, matrix)
    return rows.all()[0]


def write_whitening(path: Path, matrix: np.ndarray) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"whitening": np.ascontiguousarray(matrix)}, path)


def read_whitening(path: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    return load_file(path)["whitening"]


def _parts(users: Iterable[T], count: int, title: str) -> Iterator[list[T]]:
    """All `count` users, CHUNK at a time."""
    progress = Progress("embed", title, count)
    left, done = iter(users), 0
    while part := list(islice(left, CHUNK)):
        yield part
        done += len(part)
        progress.update(done)


def read_embeddings(embedded: Embedded) -> dict[str, tuple[list[str], np.ndarray]]:
    """role -> (user ids, unit vectors [U, D]).

    Signatures are centred first: raw ones all point along the population's mean, and their
    cosines differ in the third decimal. The centre is that of the base users (the anchor
    candidates where there are none), so that one user's new item moves that user only. Those at the
    input are then whitened (tasks/method/whitening.py).
    """
    import numpy as np
    import polars as pl

    table = pl.read_parquet(store().path(embedded.table))
    matrix = read_whitening(store().path(embedded.whitening)) if embedded.whitening else None
    sides = {}
    for role in dict.fromkeys([*ROLES, *table["role"]]):
        part = table.filter(pl.col("role") == role)
        # Not through Python lists: thousands of users times thousands of numbers.
        flat = part["vector"].explode().to_numpy().astype(np.float64)
        sides[role] = (part["user_id"].to_list(), flat.reshape(len(part), embedded.dimensions))
    centre = None
    if embedded.centred:
        population = sides["base"] if sides["base"][0] else sides["anchor"]
        centre = population[1].mean(0)
    return {
        role: (ids, unit_rows(vectors, centre, matrix)) for role, (ids, vectors) in sides.items()
    }


def _read_rows(folder: File) -> list[np.ndarray]:
    import polars as pl

    vectors = pl.read_parquet(store().path(folder) / TABLE)["vector"]
    return list(vectors.explode().to_numpy().reshape(len(vectors), -1))


def _signatures(method: Embedding, users: _Users, compute: ComputeOptions) -> Iterator[Tensor]:
    from tasks.lora.signature import input_signatures, item_signatures

    options, questions = method.options, method.questions
    assert questions
    assert method.base
    assert method.seed is not None
    sign = input_signatures if options.embedding == "input_signature" else item_signatures
    seed, own_base = derive_seed(method.seed, "signature"), method.base

    def samples(base: LoadedBase) -> Iterable[Sequence[Sequence[Encoded]]]:
        tokens = tokens_of(questions, own_base, base, "profile", users)
        return _parts(tokens, len(tokens), f"{method.task.name}: signatures of users")

    def items(base: LoadedBase, part: Sequence[Sequence[Encoded]]) -> Tensor:
        sizes = (options.signature_vocabulary, options.signature_hidden)
        return sign(base, list(chain(*part)), *sizes, seed)

    return _vectors_of_items(own_base, compute, samples, items)


def _own_states(
    method: Embedding, parts: Iterable[Sequence[Any]], compute: ComputeOptions
) -> Iterator[Tensor]:
    """The vectors of each user's texts by the base model itself: mean over tokens."""
    from tasks.lora.batches import Encoded
    from tasks.lora.signature import mean_states

    task = method.task

    def items(base: LoadedBase, part: Sequence[Sequence[dict[str, str]]]) -> Tensor:
        texts = [task.whole(item["text"], item["answer"]) for own in part for item in own]
        ids = base.tokenizer(texts, split_special_tokens=True)["input_ids"]
        return mean_states(base, [Encoded(one[: base.max_tokens], []) for one in ids])

    assert method.base is not None
    return _vectors_of_items(method.base, compute, lambda _base: parts, items)


def _vectors_of_items(
    base: Base,
    compute: ComputeOptions,
    given: Callable[[LoadedBase], Iterable[Sequence[Sequence[Item]]]],
    items: Callable[[LoadedBase, Sequence[Sequence[Item]]], Tensor],
) -> Iterator[Tensor]:
    """The vectors [N, D] that `items` makes of each user's items, user by user, in order.

    given: the items of every user, some users at a time: single ones are small batches. Each item
    is its own row.
    """
    with gpu_slot():
        loaded = load(base, compute)
        for part in given(loaded):
            yield from items(loaded, part).split([len(own) for own in part])
        # This thread may embed no more: a large model would stay in memory.
        unload()

"""Stage 3: one vector per user, from the user's history.

`signature` and `input_signature` are gradients of the user's answers at the base model's output and
input (tasks/lora/signature.py), `text` the mean vector of the items' texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tasks.config.options import ComputeOptions, EmbeddingOptions
from tasks.lamp.definitions import LampTask
from tasks.lamp.folders import ROLES
from tasks.log import log
from tasks.method.whitening import placed, unit_rows, whitening
from tasks.record import File, Record, derive_seed, key_of
from tasks.results.models import Base, Embedded, Prepared, Questions
from tasks.results.rows import Rows
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.running.progress import Progress
from tasks.running.slots import gpu_slot
from tasks.text.encoder import Encoder, encoder_of, load_encoder
from tasks.text.loading import LIBRARIES, load, unload
from tasks.text.questions import User, content
from tasks.text.tokens import tokens_of
from tasks.users import Users, each_user

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.config.task import MethodConfig

Vectors = NDArray[np.floating]
# What gives the vectors [N, D] of many items: of their tokens, or of their texts.
VectorsOf = Callable[[list[Any]], "Tensor | Vectors"]
# role -> user ids and their vectors [U, D].
Sides = dict[str, tuple[list[str], Vectors]]
# With `anchors.text_model` of this name the base model embeds texts, no encoder.
OWN_MODEL = "base"
# Users embedded at once, between two reports of progress. One user alone is a small batch.
CHUNK = 20
# Embeddings by gradients of the base model.
SIGNATURES = ("signature", "input_signature")
TABLE = "embeddings.parquet"
WHITENING_FILE = "whitening.safetensors"
# The whitening is learned from so many users, who have thousands of items.
WHITENED = 100


class Embedding(Record):
    """What decides a vector besides the history.

    questions, seed: for signatures. encoder: for texts; None: the base model embeds them.
    """

    options: EmbeddingOptions
    seed: int | None = None
    task: LampTask
    base: Base | None = None
    questions: Questions | None = None
    encoder: Encoder | None = None

    @property
    def signed(self) -> bool:
        """Whether vectors are gradients of the base model. If not, they embed texts."""
        return self.options.embedding in SIGNATURES

    def texts(self, user: User) -> list[str]:
        """The text to embed of each of the user's items."""
        return [self.task.whole(item["text"], item["answer"]) for item in user["profile"]]


def embedded_users(
    config: MethodConfig, users: Prepared, questions: Questions, base: Base,
    compute: ComputeOptions,
) -> Embedded:  # fmt: skip
    """The vectors of a method's users. Raises InputError where there is no such text encoder."""
    method = embedding_of(config, users.task, questions, base)
    # Base users are there for the centre. Vectors of texts are not centred.
    roles = ROLES if method.signed else ("anchor", "few_shot")
    return embed(method, {role: users.side(role) for role in roles}, compute)


def embedding_of(
    config: MethodConfig, task: LampTask, questions: Questions, base: Base
) -> Embedding:
    """How a method embeds users. Raises InputError where there is no such text encoder."""
    options = EmbeddingOptions.of(config.anchors)
    signed = options.embedding in SIGNATURES
    by_base = signed or options.text_model == OWN_MODEL
    encoder = None if by_base else encoder_of(options.text_model)
    return Embedding(
        # The encoder's name decides nothing: `encoder` has the hash of its files.
        options=options.model_copy(update={"text_model": OWN_MODEL}),
        seed=config.seed if signed else None,
        task=task,
        base=base if by_base else None,
        questions=questions if signed else None,
        encoder=encoder,
    )


@stage(version=6, libraries=(*LIBRARIES, "numpy"), uses_model=True)
def embed(method: Embedding, population: Mapping[str, File], compute: ComputeOptions) -> Embedded:
    """The users' vectors. Those of unchanged histories are taken from earlier tables.

    population: role -> its users.
    """
    shared = key_of(embed.identity, method)
    names: list[tuple[str, str]] = []
    keys: list[str] = []
    for role, table in population.items():
        for user in each_user(table):
            names.append((role, user["user_id"]))
            keys.append(key_of(shared, content(user["profile"])))
    tables = tuple(population.values())
    rows = Rows("embed", keys, _read_rows)
    if rows.missing:
        log(f"embedding {rows.counted()}")
        users = Users(tables, rows.missing)
        rows.add(_vectors(method, users, len(rows.missing), compute))
    vectors = np.stack(rows.all()).astype(np.float32)
    with rows.folder() as folder:
        frame = pl.DataFrame(names, ["role", "user_id"], orient="row")
        frame = frame.with_columns(vector=pl.Series(vectors).arr.to_list())
        frame.write_parquet(folder.path / TABLE)
    matrix = None
    if method.options.embedding == "input_signature":
        # The base users come first, or the candidates if there are none.
        teachers = [n for n, (role, _) in enumerate(names) if role == names[0][0]][:WHITENED]
        key = key_of("whitening", shared, [keys[n] for n in teachers])
        matrix = _whitening(method, Users(tables, teachers), len(teachers), key, compute)
    return Embedded(
        table=folder.file(TABLE),
        whitening=matrix,
        centred=method.signed,
        users=len(keys),
        dimensions=vectors.shape[1],
    )


def _vectors(
    method: Embedding, users: Iterable[User], count: int, compute: ComputeOptions
) -> list[Vectors]:
    """One vector [D] for each of `count` users: the mean over the user's items."""
    return [np.asarray(items.mean(0)) for items in _item_vectors(method, users, count, compute)]


def _item_vectors(
    method: Embedding, users: Iterable[User], count: int, compute: ComputeOptions
) -> Iterator[Tensor | Vectors]:
    """The vectors [N, D] of each user's items."""
    progress = Progress("embed", f"{method.task.name}: embeddings of users", count)
    with gpu_slot():
        vectors_of = embedder(method, compute)
        samples: Iterable[Iterable[Any]] = map(method.texts, users)
        if method.signed and method.questions and method.base:
            loaded = load(method.base, compute)
            samples = tokens_of(method.questions, method.base, loaded, "profile", users)
        left = iter(samples)
        for done in range(CHUNK, count + CHUNK, CHUNK):
            yield from by_user(vectors_of, [[*items] for items in islice(left, CHUNK)])
            progress.update(min(done, count))
        # Free the memory: this thread may embed no more.
        unload()


def by_user(vectors_of: VectorsOf, users: Sequence[Sequence[Any]]) -> Iterator[Tensor | Vectors]:
    """The vectors [N, D] of each user's items. All users' items go through the model together."""
    vectors = vectors_of([*chain(*users)])
    ends = accumulate(map(len, users))
    return (vectors[end - len(items) : end] for items, end in zip(users, ends, strict=True))


def embedder(method: Embedding, compute: ComputeOptions) -> VectorsOf:
    """How a method makes vectors of items."""
    from tasks.lora.batches import Encoded
    from tasks.lora.signature import input_signatures, item_signatures, mean_states

    base, options = method.base, method.options
    if method.encoder:
        return load_encoder(method.encoder, compute)
    assert base
    loaded = load(base, compute)
    if method.seed is not None:
        seed = derive_seed(method.seed, "signature")
        sizes = (options.signature_vocabulary, options.signature_hidden)
        sign = input_signatures if options.embedding == "input_signature" else item_signatures
        return lambda items: sign(loaded, items, *sizes, seed)

    def states(texts: list[str]) -> Tensor:
        ids = loaded.tokenizer(texts, split_special_tokens=True)["input_ids"]
        return mean_states(loaded, [Encoded(one[: loaded.max_tokens], []) for one in ids])

    return states


def _whitening(
    method: Embedding, users: Users, count: int, key: str, compute: ComputeOptions
) -> File:
    """The matrix learned from these users, kept as a row of its own: it depends on them alone."""
    rows = Rows("whitening", [key], lambda folder: [folder])
    if not rows.missing:
        return rows.all()[0]
    matrix = whitening(map(np.asarray, _item_vectors(method, users, count, compute)))
    with rows.folder() as folder:
        save_file({"whitening": np.ascontiguousarray(matrix)}, folder.path / WHITENING_FILE)
    return folder.file()


def read_whitening(folder: File) -> Vectors:
    """The matrix [D, D] of `Embedded.whitening`."""
    return load_file(store().path(folder) / WHITENING_FILE)["whitening"]


def _read_rows(folder: File) -> list[Vectors]:
    vectors = pl.read_parquet(store().path(folder) / TABLE)["vector"]
    return list(vectors.explode().to_numpy().reshape(len(vectors), -1))


def read_embeddings(embedded: Embedded) -> Sides:
    """All users' unit vectors."""
    sides, place = measured(embedded)
    return {role: (ids, unit_rows(place(raw))) for role, (ids, raw) in sides.items()}


def measured(embedded: Embedded) -> tuple[Sides, Callable[[Vectors], Vectors]]:
    """The raw vectors, and a function: from such vectors to those whose directions are compared.

    The function centres signatures: raw ones all point along the population's mean, and their
    cosines differ in the third decimal. The centre is the base users' mean, or the anchor
    candidates' if there are no base users: so a new item of one user moves that user only. It then
    whitens signatures at the input (tasks/method/whitening.py).
    """
    table = pl.read_parquet(store().path(embedded.table))
    # Converted to float64 once, not at each product.
    matrix = read_whitening(embedded.whitening).astype(np.float64) if embedded.whitening else None
    sides: Sides = {}
    for role in ROLES:
        part = table.filter(pl.col("role") == role)
        # Not through Python lists: thousands of users times thousands of numbers.
        flat = part["vector"].explode().to_numpy().astype(np.float64)
        sides[role] = (part["user_id"].to_list(), flat.reshape(len(part), embedded.dimensions))
    centre = None
    if embedded.centred:
        population = sides["base"] if sides["base"][0] else sides["anchor"]
        centre = population[1].mean(0)
    return sides, partial(placed, centre=centre, matrix=matrix)

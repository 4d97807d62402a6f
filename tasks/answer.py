"""Stages 7 and 8: for a batch of users their own LoRAs, and answers to their queries."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from tasks.config.options import ComputeOptions, TrainingOptions
from tasks.config.task import MethodConfig
from tasks.log import log
from tasks.methods import METHODS
from tasks.prepare import users_in_order
from tasks.record import File, Options, Record, Result, key_of, library_versions
from tasks.results.models import Answers, Base, Merged, Questions
from tasks.results.rows import Rows
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.running.slots import gpu_slot
from tasks.stacking import (
    WORK,
    Adapted,
    Batch,
    Work,
    merged_and_trained,
    merged_of,
    read_work,
    write_work,
)
from tasks.stand_in import plannable
from tasks.text.loading import LIBRARIES, load
from tasks.text.questions import User, content
from tasks.text.tokens import tokens_of
from tasks.training import engine_of

if TYPE_CHECKING:
    from tasks.lora.adapters import LoraBatch

TABLE = "predictions.parquet"


class MethodRef(Record):
    """A method by name; its adaptation counts by its version."""

    name: str
    version: int


class HowAnswered(Options):
    """answer: greedy decoding, or the likeliest label. quantisation: of the base model.

    libraries: those that only a quantised model needs.
    """

    answer: str
    quantisation: str
    libraries: dict[str, str] = Field({})


def how_answered(config: MethodConfig) -> HowAnswered:
    """How a method's questions are answered."""
    quantisation = config.base.quantisation
    libraries = () if quantisation == "none" else ("bitsandbytes",)
    return HowAnswered(
        answer=config.scoring.answer,
        quantisation=quantisation,
        libraries=library_versions(libraries),
    )


@stage(version=4, libraries=LIBRARIES, uses_model=True)
def answers(
    method: MethodRef,
    training: TrainingOptions | None,
    how: HowAnswered,
    users: File,
    user_ids: tuple[str, ...],
    questions: Questions,
    base: Base,
    merged: Merged | None,
    fitted: Result | None,
    seed: int,
    compute: ComputeOptions,
) -> Answers:
    """The answers to the queries of a batch of few-shot users, each with their LoRAs.

    training: of the users' own LoRAs; None for a method that trains none. merged: what users' LoRAs
    are merged from, if they are. fitted: what else the method made once. A user whose history,
    LoRAs and queries did not change is taken from an earlier batch.
    """
    import polars as pl

    batch = users_in_order(users, user_ids)
    adapt = METHODS[method.name].adaptation() or merged_and_trained
    adapted = adapt(Batch(batch, training, questions, base, merged, fitted, seed, compute))
    shared = key_of(answers.identity, how, questions, base)
    keys = [
        key_of(shared, *_asked(questions, user), loras)
        for user, loras in zip(batch, adapted.keys, strict=True)
    ]

    rows = Rows("answers", keys, _read)
    if rows.missing:
        log(f"answering for {rows.counted()}")
        with gpu_slot():
            started = time.perf_counter()
            chosen = [batch[number] for number in rows.missing]
            found = _answer(how, questions, base, adapted, chosen, compute)
            each = round((time.perf_counter() - started) / len(chosen), 4)
        rows.add([(own, each) for own in found])
    works = [
        work.model_copy(update={"seconds": work.seconds + seconds})
        for work, (_, seconds) in zip(adapted.works, rows.all(), strict=True)
    ]
    table = [
        {"row": number, "user_id": user["user_id"], "query_id": query["id"],
         "gold": query["gold"], "prediction": prediction, "seconds": seconds}
        for number, (user, (given, seconds)) in enumerate(zip(batch, rows.all(), strict=True))
        for query, prediction in zip(user["query"], given, strict=True)
    ]  # fmt: skip
    with rows.folder() as folder:
        pl.DataFrame(table).write_parquet(folder.path / TABLE)
        write_work(folder.path / WORK, user_ids, works)
    return Answers(
        users=user_ids,
        predictions=folder.file(TABLE),
        work=folder.file(WORK),
        merged=adapted.merged is not None,
        stacked=adapted.own,
        bytes_per_user=_bytes(adapted.own),
    )


@plannable
def failed_users(answered: Answers) -> list[tuple[str, Work]]:
    """The users whose training had to stop, and how far it came."""
    works = zip(answered.users, read_work(answered.work), strict=True)
    return [(user_id, work) for user_id, work in works if work.failed]


def _asked(questions: Questions, user: User) -> tuple[object, ...]:
    """What of a user the answers depend on, beside the LoRAs. Ids too: they stand in the table."""
    queries = [[item["id"], item["input"], item["gold"]] for item in user["query"]]
    history = content(user["profile"]) if questions.prompt.history_items else None
    return user["user_id"], queries, history


def _bytes(stacked: File | None) -> int:
    """What one user's own LoRA takes in float32."""
    if stacked is None:
        return 0
    from tasks.lora.bank import read_bank

    shard = read_bank(store().path(stacked))
    return sum(4 * (a[0].numel() + b[0].numel()) for a, b in shard.layers.values())


def _read(folder: File) -> list[tuple[list[str], float]]:
    import polars as pl

    table = pl.read_parquet(store().path(folder) / TABLE)
    rows: list[tuple[list[str], float]] = []
    for number, prediction, seconds in table.select("row", "prediction", "seconds").iter_rows():
        while len(rows) <= number:
            rows.append(([], seconds))
        rows[number][0].append(prediction)
    return rows


def _answer(
    how: HowAnswered,
    questions: Questions,
    base: Base,
    adapted: Adapted,
    users: Sequence[User],
    compute: ComputeOptions,
) -> list[list[str]]:
    """The users' answers; many are answered for at once, each with their LoRAs."""
    from tasks.lora.bank import read_bank
    from tasks.lora.merge import MergedUsers

    loaded = load(base, compute, how.quantisation)
    ids = [str(user["user_id"]) for user in users]
    below = None
    if adapted.merged:
        below = MergedUsers(*merged_of(adapted.merged, ids), loaded.device)
    own: LoraBatch | None = None
    if adapted.own:
        shard = read_bank(store().path(adapted.own))
        own = shard.of([shard.ids.index(user_id) for user_id in ids]).to(loaded.device)

    def parts(batch: Sequence[int]) -> tuple[LoraBatch | None, LoraBatch | None]:
        return below.parts(batch) if below else None, own.of(batch) if own else None

    task = questions.task
    choose = how.answer == "likelihood" and bool(task.labels)
    samples = tokens_of(questions, base, loaded, "choices" if choose else "queries", users)
    names = sorted({*(below.layers if below else ()), *(own.layers if own else ())})
    engine = engine_of(base.engine)
    with engine.grouped(loaded.model, names) as layers:
        if not choose:
            queries = [list(mine) for mine in samples]
            answered: list[list[str]] = engine.answer_users(
                loaded, layers, queries, parts, task.max_new_tokens
            )
            return answered
        each = len(task.labels)
        asked = [
            [mine[start : start + each] for start in range(0, len(mine), each)] for mine in samples
        ]
        best = engine.likeliest(loaded, layers, asked, parts)
    return [[task.labels[number] for number in mine] for mine in best]

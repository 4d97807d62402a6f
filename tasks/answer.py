"""Stages 7 and 8: a batch of users' own LoRAs, and the answers to their queries."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

import polars as pl

from tasks.config.task import MethodConfig
from tasks.errors import label
from tasks.log import log
from tasks.method.prior import log_prior
from tasks.methods import METHODS
from tasks.methods.method import Method
from tasks.model import loaded_model
from tasks.recipes import Merger, read_recipes
from tasks.record import File, Result, key_of, library_versions
from tasks.results.models import Answers, Merged, Setting
from tasks.results.rows import Rows
from tasks.results.stage import stage
from tasks.results.store import store
from tasks.stacking import WORK, Adapted, Batch, HowAnswered, merged_and_trained, write_work
from tasks.text.loading import LIBRARIES
from tasks.text.questions import User, asked, content
from tasks.text.tokens import by_question
from tasks.users import users_in_order

if TYPE_CHECKING:
    from torch import Tensor

    from tasks.lora.adapters import LoraBatch
    from tasks.lora.batches import Encoded

TABLE = "predictions.parquet"
# A user's answers; and per query the log-likelihood of each label, where labels were compared.
Answered = tuple[list[str], list[list[float]]]
# The same, and the seconds that it took.
Row = tuple[list[str], list[list[float]], float]


def how_answered(config: MethodConfig) -> HowAnswered:
    """How a method is configured to adapt its users and to answer."""
    quantisation = config.base.quantisation
    return HowAnswered(
        method=config.method,
        version=METHODS[config.method].version,
        training=config.training,
        answer=config.scoring.answer,
        prior=config.label_prior if METHODS[config.method].label_prior else None,
        quantisation=quantisation,
        libraries=library_versions(() if quantisation == "none" else ("bitsandbytes",)),
    )


@stage(version=6, libraries=LIBRARIES, uses_model=True)
def answers(
    how: HowAnswered,
    users: File,
    user_ids: tuple[str, ...],
    merged: Merged | None,
    fitted: Result | None,
    setting: Setting,
) -> Answers:
    """The answers to the queries of a batch of few-shot users, each with their LoRAs.

    merged: what users' LoRAs are merged from, if they are. fitted: what else the method made once.
    A user whose history, LoRAs and queries did not change is taken from an earlier batch.
    """
    merger = Merger(merged, read_recipes(merged.recipes, user_ids)) if merged else None
    records, method = users_in_order(users, user_ids), METHODS[how.method]
    batch = Batch(records, how, merger, fitted, setting)
    batch, text_bytes, text_seconds = with_texts(method, batch)
    adapted = (method.adapt or merged_and_trained)(batch)
    rows = Rows("answers", _keys(batch, adapted), _read)
    if rows.missing:
        log(f"answering for {rows.counted()}")
        rows.add(answered(batch, adapted, rows.missing))
    chosen, scores, seconds = zip(*rows.all(), strict=True)
    predictions = [
        weighed(user, texts, log_p, batch)
        for user, texts, log_p in zip(records, chosen, scores, strict=True)
    ]
    works = [
        work.model_copy(update={"seconds": work.seconds + sum(more)})
        for work, *more in zip(adapted.works, seconds, text_seconds, strict=True)
    ]
    columns = {
        "user_id": user_ids,
        "query_id": [[query["id"] for query in user["query"]] for user in batch.users],
        "gold": [[query["gold"] for query in user["query"]] for user in batch.users],
        "prediction": predictions,
        "chosen": chosen,
        "log_p": scores,
        "seconds": seconds,
    }
    with rows.folder() as folder:
        pl.DataFrame(columns).write_parquet(folder.path / TABLE)
        write_work(folder.path / WORK, user_ids, works)
    return Answers(
        users=user_ids,
        predictions=folder.file(TABLE),
        work=folder.file(WORK),
        merged=adapted.merger is not None and method.answer is None,
        stacked=adapted.file,
        bytes_per_user=adapted.bytes_per_user + text_bytes,
        failed=tuple(
            f"training of user {label(user_id)}: the loss stopped being finite at step "
            f"{work.steps}; lower {method.trained}.learning_rate"
            for user_id, work in zip(user_ids, works, strict=True)
            if work.failed
        ),
    )


def with_texts(method: Method, batch: Batch) -> tuple[Batch, int, list[float]]:
    """The batch with the method's text about each user; the mean bytes and each one's seconds."""
    if method.about is None:
        return batch, 0, [0.0] * len(batch.users)
    texts, seconds = zip(*method.about(batch), strict=True)
    users = [{**user, "about": text} for user, text in zip(batch.users, texts, strict=True)]
    size = round(fmean(len(text.encode()) for text in texts))
    return replace(batch, users=users), size, [*seconds]


def weighed(user: User, chosen: list[str], log_p: list[list[float]], batch: Batch) -> list[str]:
    """A user's answers: those `chosen`, or the likeliest labels with the user's prior.

    log_p: per query the log-likelihood of each label; none where labels were not compared.
    """
    prior, labels = batch.how.prior, batch.setting.questions.task.labels
    if prior is None or not log_p:
        return chosen
    history = [item["answer"] for item in user["profile"]]
    weights = [prior.strength * one for one in log_prior(history, labels, prior.smoothing)]
    sums = [[a + b for a, b in zip(query, weights, strict=True)] for query in log_p]
    return [labels[one.index(max(one))] for one in sums]


def _keys(batch: Batch, adapted: Adapted) -> list[str]:
    """The cache keys of users' answers. Methods with the same LoRAs and questions share answers.

    The ids of users and queries are in a key, since the table has them.
    """
    how, questions = batch.how, batch.setting.questions
    by_method = METHODS[how.method].answer is not None
    about = (how.answer, how.quantisation, how.libraries, questions, batch.setting.base)
    method = (how.method, how.version, batch.fitted) if by_method else ()
    shared = key_of(answers.identity, *about, *method)
    keys = []
    for user, loras in zip(batch.users, adapted.keys, strict=True):
        needed = by_method or questions.prompt.history_items
        history = content(user["profile"]) if needed else None
        keys.append(key_of(shared, user["user_id"], asked(user), history, loras))
    return keys


def _read(folder: File) -> list[Row]:
    table = pl.read_parquet(store().path(folder) / TABLE)
    return list(table.select("chosen", "log_p", "seconds").iter_rows())


def answered(batch: Batch, adapted: Adapted, numbers: Sequence[int]) -> list[Row]:
    """The answers to the batch's users of these numbers, computed at once."""
    from tasks.lora.merge import MergedUsers

    users, task = [batch.users[number] for number in numbers], batch.setting.questions.task
    how = batch.how
    if answer := METHODS[how.method].answer:
        started = time.perf_counter()
        texts = answer(replace(batch, users=users))
        each = round((time.perf_counter() - started) / len(users), 4)
        return [(one, [], each) for one in texts]
    labels = () if how.answer == "generate" else task.labels
    with loaded_model(batch.setting, how.quantisation) as model:
        device, merger = model.base.device, adapted.merger
        user_ids = [batch.names[number] for number in numbers]
        below = MergedUsers(*merger.chosen(user_ids), device) if merger else None
        above = adapted.loras.of(numbers).to(device) if adapted.loras else None

        def parts(some: Sequence[int]) -> tuple[LoraBatch | None, LoraBatch | None]:
            return below.parts(some) if below else None, above.of(some) if above else None

        samples = model.tokens("choices" if labels else "queries", users)
        names = sorted({*(below.layers if below else ()), *(above.layers if above else ())})
        with model.engine.grouped(model.base.model, names) as layers:
            if labels:
                choices = [by_question(one, len(labels)) for one in samples]
                log_p = model.engine.answer_log_p(model.base, layers, choices, parts)
                rows = _best(how.answer, labels, choices, log_p)
            else:
                queries, most = [[*one] for one in samples], task.max_new_tokens
                texts = model.engine.answer_users(model.base, layers, queries, parts, most)
                rows = [(one, []) for one in texts]
        each = model.seconds_each(len(users))
    return [(*row, each) for row in rows]


def _best(
    how: str,
    labels: Sequence[str],
    choices: Sequence[Sequence[Sequence[Encoded]]],
    tokens: Sequence[Sequence[Sequence[Tensor]]],
) -> list[Answered]:
    """Per user the best label of each question, and the log-likelihood of each label.

    choices: per user and question one sample per label. tokens: the log p of each of their tokens.
    """
    from tasks.lora.answer import greediest

    log_p = [[[float(label.sum()) for label in one] for one in user] for user in tokens]
    if how == "constrained":
        best = [[*map(greediest, *both)] for both in zip(choices, tokens, strict=True)]
    else:
        best = [[one.index(max(one)) for one in user] for user in log_p]
    chosen = [[labels[number] for number in user] for user in best]
    return list(zip(chosen, log_p, strict=True))

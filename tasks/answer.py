"""Stages 7 and 8: for a batch of users their own LoRAs, and answers to their queries."""

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
# A user's answers, and the log-likelihood of each label for each query where these were compared.
Answered = tuple[list[str], list[list[float]]]
# With the seconds that it took.
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
    some = users_in_order(users, user_ids)
    merger = Merger(merged, read_recipes(merged.recipes, user_ids)) if merged else None
    batch, method = Batch(some, how, merger, fitted, setting), METHODS[how.method]
    batch, about, before = told(method, batch)
    adapted = (method.adapt or merged_and_trained)(batch)
    rows = Rows("answers", _keys(batch, adapted), _read)
    if rows.missing:
        log(f"answering for {rows.counted()}")
        rows.add(answered(batch, adapted, rows.missing))
    chosen, scores, seconds = zip(*rows.all(), strict=True)
    predictions = [
        weighed(user, mine, log_p, batch)
        for user, mine, log_p in zip(some, chosen, scores, strict=True)
    ]
    works = [
        work.model_copy(update={"seconds": work.seconds + sum(each)})
        for work, *each in zip(adapted.works, seconds, before, strict=True)
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
        bytes_per_user=adapted.bytes_per_user + about,
        failed=tuple(
            f"training of user {label(user_id)}: the loss stopped being finite at step "
            f"{work.steps}; lower {method.trained}.learning_rate"
            for user_id, work in zip(user_ids, works, strict=True)
            if work.failed
        ),
    )


def told(method: Method, batch: Batch) -> tuple[Batch, int, list[float]]:
    """The batch with the method's text about each user, its mean bytes, and each one's seconds."""
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
    given = [item["answer"] for item in user["profile"]]
    weights = [prior.strength * one for one in log_prior(given, labels, prior.smoothing)]
    sums = [[a + b for a, b in zip(own, weights, strict=True)] for own in log_p]
    return [labels[one.index(max(one))] for one in sums]


def _keys(batch: Batch, adapted: Adapted) -> list[str]:
    """What each user's answers depend on: not the method's name, so that methods alike share them.

    The ids of users and queries too, as they stand in the table.
    """
    how, questions = batch.how, batch.setting.questions
    alone = METHODS[how.method].answer is not None
    about = (how.answer, how.quantisation, how.libraries, questions, batch.setting.base)
    own = (how.method, how.version, batch.fitted) if alone else ()
    shared = key_of(answers.identity, *about, *own)
    keys = []
    for user, loras in zip(batch.users, adapted.keys, strict=True):
        history = content(user["profile"]) if alone or questions.prompt.history_items else None
        keys.append(key_of(shared, user["user_id"], asked(user), history, loras))
    return keys


def _read(folder: File) -> list[Row]:
    table = pl.read_parquet(store().path(folder) / TABLE)
    return list(table.select("chosen", "log_p", "seconds").iter_rows())


def answered(batch: Batch, adapted: Adapted, numbers: Sequence[int]) -> list[Row]:
    """What is answered to the batch's users of these numbers, all of them at once."""
    from tasks.lora.merge import MergedUsers

    users, task = [batch.users[number] for number in numbers], batch.setting.questions.task
    how = batch.how
    if answer := METHODS[how.method].answer:
        started = time.perf_counter()
        texts = answer(replace(batch, users=users))
        each = round((time.perf_counter() - started) / len(users), 4)
        return [(mine, [], each) for mine in texts]
    labels = () if how.answer == "generate" else task.labels
    with loaded_model(batch.setting, how.quantisation) as model:
        device, merger = model.base.device, adapted.merger
        names = [batch.names[number] for number in numbers]
        below = MergedUsers(*merger.chosen(names), device) if merger else None
        own = adapted.own.of(numbers).to(device) if adapted.own else None

        def parts(some: Sequence[int]) -> tuple[LoraBatch | None, LoraBatch | None]:
            return below.parts(some) if below else None, own.of(some) if own else None

        samples = model.tokens("choices" if labels else "queries", users)
        layers_of = sorted({*(below.layers if below else ()), *(own.layers if own else ())})
        with model.engine.grouped(model.base.model, layers_of) as layers:
            if labels:
                choices = [by_question(mine, len(labels)) for mine in samples]
                log_p = model.engine.answer_log_p(model.base, layers, choices, parts)
                found = _best(how.answer, labels, choices, log_p)
            else:
                queries, most = [[*mine] for mine in samples], task.max_new_tokens
                texts = model.engine.answer_users(model.base, layers, queries, parts, most)
                found = [(mine, []) for mine in texts]
        each = model.seconds_each(len(users))
    return [(*one, each) for one in found]


def _best(
    how: str,
    labels: Sequence[str],
    choices: Sequence[Sequence[Sequence[Encoded]]],
    tokens: Sequence[Sequence[Sequence[Tensor]]],
) -> list[Answered]:
    """Per user the best labels, and the log-likelihood of each label.

    choices: per user and question a sample per label. tokens: log p of each token of these.
    """
    from tasks.lora.answer import greediest

    log_p = [[[float(label.sum()) for label in one] for one in mine] for mine in tokens]
    if how == "constrained":
        best = [[*map(greediest, *both)] for both in zip(choices, tokens, strict=True)]
    else:
        best = [[one.index(max(one)) for one in mine] for mine in log_p]
    chosen = [[labels[number] for number in mine] for mine in best]
    return list(zip(chosen, log_p, strict=True))

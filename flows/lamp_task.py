"""One LaMP task under one seed: the method, stage by stage. The work itself is in `tasks/`.

Prepare users, take the base model, embed the users, choose anchors, train their meta-LoRAs, put
them into a bank (or take one of adapters that are given), find each few-shot user's recipe; then,
for each method, train the users' own LoRAs, answer their queries, and compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tasks.anchors import anchors, described
from tasks.answer import answers, how_answered
from tasks.base_model import base_model, coverage_lines
from tasks.clusters import clustered
from tasks.compare import compared
from tasks.config.task import MethodConfig, TaskConfig
from tasks.embed import embedded_users
from tasks.errors import InputError, label
from tasks.fusion import described as described_recipes
from tasks.fusion import evidence, fusion
from tasks.learned_weights import learned_weights
from tasks.log import log
from tasks.meta_lora import bank, meta_lora
from tasks.methods import METHODS, MethodName
from tasks.own_bank import given_adapters, own_bank
from tasks.prepare import prepared_users
from tasks.record import Result
from tasks.results.models import (
    Anchors,
    Answers,
    Bank,
    Base,
    Embedded,
    Merged,
    MetaLoras,
    Prepared,
    Setting,
)
from tasks.results.run import Cell, Merging, merging_of
from tasks.results.stage import Job, StageFailed, within
from tasks.running.progress import Progress
from tasks.text.questions import setting_of

# What a job is about: the anchors, or a method and the number of a batch.
Piece = TypeVar("Piece", bound=tuple[object, ...])
R = TypeVar("R", bound=Result)
T = TypeVar("T")


def lamp_task(config: TaskConfig, known: Cell | None = None) -> Cell:
    """All stages of one LaMP task.

    known: a cell that differs only in the few-shot users' items; its base and banks are taken.
    Raises InputError, in one line, when a stage that all others need gives nothing.
    """
    missing: list[str] = []
    users = prepared_users(config)
    base = known.base if known else base_model(config, users)
    coverage = known.coverage if known else coverage_lines(config, base)
    mergings: list[Merging] = []
    for names in config.sharing_a_bank():
        with noted(", ".join(names), missing):
            before = known.merging(names[0]) if known else None
            mergings.append(bank_and_recipes(config, names, users, base, before, missing))
    methods = [
        name for name in config.methods if not METHODS[name].merged or merging_of(mergings, name)
    ]
    if not methods:
        raise StageFailed(missing[0])
    answered = all_answers(config, methods, users, base, mergings, known, missing)
    return Cell(
        config=config,
        users=users,
        base=base,
        mergings=tuple(mergings),
        answers=answered,
        compared=compared(config, users, answered),
        coverage=coverage,
        missing=tuple(f"{config.name}: {line}" for line in missing),
    )


def bank_and_recipes(
    config: TaskConfig,
    methods: tuple[MethodName, ...],
    users: Prepared,
    base: Base,
    known: Merging | None,
    missing: list[str],
) -> Merging:
    """The bank, of anchors or of adapters that are given, and every few-shot user's recipe."""
    own = config.method(methods[0])
    setting = setting_of(config, own, users, base)
    # First: one that is refused is refused before users are embedded.
    given = own_bank(given_adapters(own.bank), base) if own.bank.adapters and not known else None
    embedded = embedded_users(own, users, setting.questions, base, config.compute)
    if known:
        chosen, members = known.chosen, known.merged.bank
    elif given:
        chosen, members = None, given
    else:
        chosen, members = bank_of_anchors(config, own, users, embedded, setting, missing)
    weighed = None
    if own.fusion.by_evidence:
        weighed = evidence(own.fusion.shortlist, embedded, members, users.few_shot, setting)
    recipes = fusion(own.fusion, embedded, members, weighed)
    log(described_recipes(recipes, own.fusion))
    merged = Merged(bank=members, recipes=recipes, how=own.fusion.merge)
    if own.fusion.weights == "learned":
        trained = learned_weights(own.fusion.learned, merged, users.few_shot, setting)
        merged = merged.model_copy(update={"recipes": trained})
    if remade := METHODS[methods[0]].recipes:
        recipes = remade(own, users, embedded, merged, setting)
        merged = merged.model_copy(update={"recipes": recipes})
    return Merging(methods=methods, embedded=embedded, chosen=chosen, merged=merged)


def bank_of_anchors(
    config: TaskConfig,
    own: MethodConfig,
    users: Prepared,
    embedded: Embedded,
    setting: Setting,
    missing: list[str],
) -> tuple[Anchors, Bank]:
    """Anchors chosen and trained, and the bank of them.

    Raises StageFailed when no anchor could be trained.
    """
    clusters = clustered(own.anchors, own.meta_lora, embedded, users.anchor, setting)
    chosen = anchors(own.anchors, embedded, users.anchor, clusters)
    log(described(chosen, own.anchors.min_items),
        warning=0 < chosen.single_users < chosen.asked)  # fmt: skip
    jobs: dict[tuple[str, ...], Job[MetaLoras]] = {}
    for part in batches_of(chosen.anchors, own.anchors.per_job):
        names = tuple(one.name for one in part)
        with within(piece("anchor", names)):
            jobs[names] = meta_lora.submit(own.meta_lora, part, users.anchor, setting)
    made = collected(jobs, "anchor", f"{config.name}: meta-LoRAs", missing).values()
    missing += [line for job in made for line in job.failed]
    loras = tuple(one for job in made for one in job.loras)
    if not loras:
        raise StageFailed(f"no anchor could be trained; {missing[0]}")
    usual = bank(loras, chosen, f"{config.name}, {own.method}")
    remade = METHODS[own.method].bank
    return chosen, remade(own, users, chosen, usual, setting) if remade else usual


def all_answers(
    config: TaskConfig,
    methods: Sequence[MethodName],
    users: Prepared,
    base: Base,
    mergings: Sequence[Merging],
    known: Cell | None,
    missing: list[str],
) -> dict[MethodName, tuple[Answers, ...]]:
    """Every method's answers, batch by batch; a batch that one method lacks is left out of all.

    Those of a method that looks at no items are the known ones; a method whose `fit` fails
    is left out. Raises StageFailed where no batch is left.
    """
    batches = batches_of(users.few_shot_ids, config.stacking.users_per_job)
    made: dict[tuple[MethodName, int], Answers] = {}
    jobs: dict[tuple[MethodName, int], Job[Answers]] = {}
    able: list[MethodName] = []
    for name in methods:
        own, method = config.method(name), METHODS[name]
        merging = merging_of(mergings, name)
        merged = merging.merged if merging else None
        setting, how = setting_of(config, own, users, base), how_answered(own)
        fitted, before_it = None, len(missing)
        if method.fit:
            with noted(name, missing):
                fitted = method.fit(own, users, setting, merged)
        if len(missing) > before_it:
            continue
        able.append(name)
        same = known.answers.get(name, ()) if known and not method.uses_items else ()
        before = {answered.users: answered for answered in same}
        for number, batch in enumerate(batches):
            if batch in before:
                made[name, number] = before[batch]
                continue
            with within(f"{name} {number}"):
                jobs[name, number] = answers.submit(
                    how, users.few_shot, batch, merged, fitted, setting
                )
    made |= collected(jobs, "answers of", f"{config.name}: methods", missing)
    complete = [n for n in range(len(batches)) if all((name, n) in made for name in able)]
    if not (able and complete):
        raise StageFailed(f"no batch of users could be scored; {missing[0]}")
    missing += [f"{name}, {line}" for (name, _), one in made.items() for line in one.failed]
    return {name: tuple(made[name, number] for number in complete) for name in able}


def collected(
    jobs: Mapping[Piece, Job[R]], kind: str, title: str, missing: list[str]
) -> dict[Piece, R]:
    """The results of jobs, by what they are about; those that failed are named in `missing`.

    Raises DiskFull as soon as one ended for want of disk.
    """
    progress = Progress("jobs", title, len(jobs))
    results: dict[Piece, R] = {}
    for about, job in jobs.items():
        with noted(piece(kind, about), missing):
            results[about] = job.result()
        progress.advance()
    return results


def batches_of(everything: tuple[T, ...], size: int) -> list[tuple[T, ...]]:
    """`size` at a time."""
    return [everything[start : start + size] for start in range(0, len(everything), size)]


@contextmanager
def noted(what: str, missing: list[str]) -> Iterator[None]:
    """Where `what` cannot be made it is named in `missing`, and the rest goes on."""
    try:
        yield
    except InputError as error:
        missing.append(f"{what}: {error}")
        log(f"missing: {missing[-1]}", warning=True)


def piece(kind: str, about: tuple[object, ...]) -> str:
    """A job's name: `anchor a b`, `answers of mta 0`."""
    return " ".join([kind, *(label(str(one)) for one in about)])

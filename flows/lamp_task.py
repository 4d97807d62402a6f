"""One LaMP task under one seed: the method, stage by stage. The work itself is in `tasks/`.

Prepare users, take the base model, embed the users, choose anchors, train their meta-LoRAs, put
them into a bank, find each few-shot user's recipe; then, for each method, train the users' own
LoRAs, answer their queries, and compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from tasks.anchors import anchors, described
from tasks.answer import MethodRef, answers, failed_users, how_answered
from tasks.base_model import base_model, coverage_lines
from tasks.compare import compared
from tasks.config.task import MethodConfig, TaskConfig
from tasks.embed import embedded_users
from tasks.errors import InputError, label
from tasks.fusion import Asked, fusion
from tasks.fusion import described as described_recipes
from tasks.log import log
from tasks.meta_lora import bank, meta_lora
from tasks.methods import METHODS, MethodName
from tasks.prepare import prepared_users
from tasks.record import Result
from tasks.refit import refitted_clusters
from tasks.results.models import Anchors, Answers, Bank, Base, Merged, MetaLora, Prepared, Questions
from tasks.results.run import Cell, Merging, merging_of
from tasks.results.stage import Job, StageFailed, within
from tasks.running.progress import Progress
from tasks.text.questions import questions_of

R = TypeVar("R", bound=Result)


def lamp_task(config: TaskConfig, known: Cell | None = None) -> Cell:
    """All stages of one LaMP task.

    known: a cell that differs only in the few-shot users' items; its base and banks are taken.
    Raises InputError, in one line, when a stage that all others need gives nothing.
    """
    missing: list[str] = []
    users = prepared_users(config)
    base = known.base if known else base_model(config, users)
    coverage = coverage_lines(config, base)
    mergings = banks(config, users, base, known, missing)
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
        answers={name: tuple(batches) for name, batches in answered.items()},
        compared=compared(config, users, answered),
        coverage=coverage,
        missing=tuple(f"{config.name}: {line}" for line in missing),
    )


def banks(
    config: TaskConfig, users: Prepared, base: Base, known: Cell | None, missing: list[str]
) -> list[Merging]:
    """The banks and recipes of the methods that merge; methods alike share them.

    A method whose bank or recipes cannot be made has none, and is named in `missing`.
    """
    alike: dict[str, list[MethodName]] = {}
    for name in config.methods:
        if METHODS[name].merged:
            alike.setdefault(config.method(name).bank_kind, []).append(name)
    found = []
    for names in alike.values():
        before = known.merging(names[0]) if known else None
        try:
            found.append(bank_and_recipes(config, tuple(names), users, base, before, missing))
        except InputError as error:
            missing.append(f"{', '.join(names)}: {error}")
            log(f"missing: {missing[-1]}", warning=True)
    return found


def bank_and_recipes(
    config: TaskConfig,
    methods: tuple[MethodName, ...],
    users: Prepared,
    base: Base,
    known: Merging | None,
    missing: list[str],
) -> Merging:
    """Anchors chosen and trained, the bank of them, and every few-shot user's recipe.

    Raises StageFailed when no anchor could be trained.
    """
    own, compute = config.method(methods[0]), config.compute
    questions = questions_of(own.prompt, users, own.base.model)
    embedded = embedded_users(own, users, questions, base, compute)
    if known:
        chosen, members = known.chosen, known.merged.bank
    else:
        clusters = refitted_clusters(
            own.anchors, own.meta_lora, embedded, users.anchor, questions, base, own.seed, compute
        )
        chosen = anchors(own.anchors, embedded, users.anchor, clusters, own.seed)
        log(described(chosen, own.anchors.min_items),
            warning=0 < chosen.single_users < chosen.asked)  # fmt: skip
        members = trained_bank(config, own, chosen, users, questions, base, missing)
    asked = None
    if own.fusion.weights == "evidence":
        asked = Asked(users=users.few_shot, questions=questions, base=base)
    recipes = fusion(own.fusion, embedded, members, asked, compute)
    log(described_recipes(recipes, own.fusion))
    merged = Merged(bank=members, recipes=recipes, how=own.fusion.merge)
    return Merging(methods=methods, embedded=embedded, chosen=chosen, merged=merged)


def trained_bank(
    config: TaskConfig,
    own: MethodConfig,
    chosen: Anchors,
    users: Prepared,
    questions: Questions,
    base: Base,
    missing: list[str],
) -> Bank:
    """The meta-LoRAs of the chosen anchors, a job for each `anchors.per_job` of them.

    Raises StageFailed when no anchor could be trained.
    """
    size, listed = own.anchors.per_job, chosen.anchors
    parts = [listed[start : start + size] for start in range(0, len(listed), size)]
    names = ["anchor " + " ".join(label(one.name) for one in part) for part in parts]
    jobs = []
    for name, part in zip(names, parts, strict=True):
        with within(name):
            jobs.append(
                meta_lora.submit(
                    own.meta_lora, part, users.anchor, questions, base, own.seed, config.compute
                )
            )
    loras: list[MetaLora] = []
    for made in collected(jobs, names, f"{config.name}: meta-LoRAs", missing).values():
        loras += made.loras
        missing += made.failed
    if not loras:
        raise StageFailed(f"no anchor could be trained; {missing[0]}")
    return bank(tuple(loras), chosen, f"{config.name}, {own.method}")


def all_answers(
    config: TaskConfig,
    methods: Sequence[MethodName],
    users: Prepared,
    base: Base,
    mergings: Sequence[Merging],
    known: Cell | None,
    missing: list[str],
) -> dict[MethodName, list[Answers]]:
    """Every method's answers, batch by batch; a batch that one method lacks is left out of all.

    Those of a method that looks at no items are the known ones.

    Raises StageFailed where no batch is left.
    """
    size, ids = config.stacking.users_per_job, users.few_shot_ids
    batches = [ids[start : start + size] for start in range(0, len(ids), size)]
    made: dict[tuple[MethodName, int], Answers] = {}
    jobs: dict[tuple[MethodName, int], Job[Answers]] = {}
    for name in methods:
        own = config.method(name)
        merging = merging_of(mergings, name)
        how = how_answered(own)
        questions = questions_of(own.prompt, users, own.base.model)
        method = MethodRef(name=name, version=METHODS[name].version)
        fitted = METHODS[name].fit(own, users, base)
        before: dict[tuple[str, ...], Answers] = {}
        if known and not METHODS[name].uses_items:
            before = {batch.users: batch for batch in known.answers.get(name, ())}
        for number, batch in enumerate(batches):
            if batch in before:
                made[name, number] = before[batch]
                continue
            with within(f"{name} {number}"):
                jobs[name, number] = answers.submit(
                    method, own.training, how, users.few_shot, batch, questions, base,
                    merging.merged if merging else None, fitted, own.seed, config.compute,
                )  # fmt: skip
    names = [f"answers of {name} {number}" for name, number in jobs]
    found = collected(list(jobs.values()), names, f"{config.name}: methods", missing)
    made |= {key: found[name] for key, name in zip(jobs, names, strict=True) if name in found}
    complete = [n for n in range(len(batches)) if all((name, n) in made for name in methods)]
    if not complete:
        raise StageFailed(f"no batch of users could be scored; {missing[0]}")
    for (name, _), answered in made.items():
        missing += [
            f"{name}, training of user {label(user_id)}: the loss stopped being finite at step "
            f"{work.steps}; lower {METHODS[name].trained}.learning_rate"
            for user_id, work in failed_users(answered)
        ]
    return {name: [made[name, number] for number in complete] for name in methods}


def collected(
    jobs: Sequence[Job[R]], names: Sequence[str], title: str, missing: list[str]
) -> dict[str, R]:
    """The results of jobs by name; those that failed are named in `missing`.

    One failure leaves the others. Raises DiskFull as soon as one ended for want of disk.
    """
    progress = Progress("jobs", title, len(jobs))
    results: dict[str, R] = {}
    for name, job in zip(names, jobs, strict=True):
        try:
            results[name] = job.result()
        except InputError as error:
            missing.append(f"{name}: {error}")
            log(f"missing: {missing[-1]}", warning=True)
        progress.advance()
    return results

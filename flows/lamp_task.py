"""One LaMP task under one seed: the method, stage by stage. The work itself is in `tasks/`.

Prepare users, take the base model, embed the users, choose anchors, train their meta-LoRAs, put
them into a bank (or take one of adapters that are given), find each few-shot user's recipe; then,
for each method, train the users' own LoRAs, answer their queries, and compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tasks.anchors import chosen_anchors
from tasks.answer import answers, how_answered
from tasks.bank import bank, given_adapters, meta_lora, own_bank
from tasks.base_model import base_model, coverage_lines
from tasks.compare import compared
from tasks.config.task import MethodConfig, TaskConfig
from tasks.embed import embedded_users
from tasks.fusion import merged_loras
from tasks.methods import METHODS, MethodName
from tasks.prepare import prepared_users
from tasks.results.models import Anchors, Answers, Bank, Base, Embedded, Prepared, Setting
from tasks.results.run import Cell, Merging
from tasks.results.stage import StageFailed, within
from tasks.running.jobs import batches_of, collected, noted, piece
from tasks.text.questions import setting_of


@dataclass(frozen=True)
class Common:
    """What all later stages are given. known: a cell with other few-shot items; missing: lines."""

    config: TaskConfig
    users: Prepared
    base: Base
    known: Cell | None = None
    missing: list[str] = field(default_factory=list)

    def setting(self, own: MethodConfig) -> Setting:
        return setting_of(self.config, own, self.users, self.base)


def lamp_task(config: TaskConfig, known: Cell | None = None) -> Cell:
    """All stages of one LaMP task; of a known cell, base and banks are taken.

    Raises InputError, in one line, when a stage that all others need gives nothing.
    """
    users = prepared_users(config)
    base = known.base if known else base_model(config, users)
    coverage = known.coverage if known else coverage_lines(config, base)
    cell = personalised(Common(config, users, base, known))
    return cell.model_copy(update={"coverage": coverage})


def personalised(common: Common) -> Cell:
    """Banks and recipes, every method's answers, and the comparison."""
    config, missing = common.config, common.missing
    mergings: list[Merging] = []
    for names in config.sharing_a_bank():
        with noted(", ".join(names), missing):
            mergings.append(bank_and_recipes(common, names))
    answered = all_answers(common, mergings)
    return Cell(
        config=config,
        users=common.users,
        base=common.base,
        mergings=tuple(mergings),
        answers=answered,
        compared=compared(config, common.users, answered),
        missing=tuple(f"{config.name}: {line}" for line in missing),
    )


def bank_and_recipes(common: Common, methods: tuple[MethodName, ...]) -> Merging:
    """The bank, of anchors or of adapters that are given, and every few-shot user's recipe."""
    users, known = common.users, common.known and common.known.merging(methods[0])
    own = common.config.method(methods[0])
    setting = common.setting(own)
    chosen, members = (known.chosen, known.merged.bank) if known else (None, None)
    if own.bank.adapters and not known:
        # First: one that is refused is refused before users are embedded.
        members = own_bank(given_adapters(own.bank), common.base)
    embedded = embedded_users(own, users, setting.questions, common.base, setting.compute)
    if members is None:
        chosen, members = bank_of_anchors(common, own, embedded, setting)
    merged = merged_loras(own.fusion, embedded, members, users.few_shot, setting)
    if remade := METHODS[methods[0]].recipes:
        recipes = remade(own, users, embedded, merged, setting)
        merged = merged.model_copy(update={"recipes": recipes})
    return Merging(methods=methods, embedded=embedded, chosen=chosen, merged=merged)


def bank_of_anchors(
    common: Common, own: MethodConfig, embedded: Embedded, setting: Setting
) -> tuple[Anchors, Bank]:
    """Anchors chosen and trained, and their bank. Raises StageFailed where none can be trained."""
    name, users, missing = common.config.name, common.users, common.missing
    chosen = chosen_anchors(own.anchors, embedded, users.anchor, setting.seed)
    jobs = {}
    for part in batches_of(chosen.anchors, own.anchors.per_job):
        names = tuple(one.name for one in part)
        with within(piece("anchor", names)):
            jobs[names] = meta_lora.submit(own.meta_lora, part, users.anchor, setting)
    made = collected(jobs, "anchor", f"{name}: meta-LoRAs", missing).values()
    missing += [line for job in made for line in job.failed]
    loras = tuple(one for job in made for one in job.loras)
    if not loras:
        raise StageFailed(f"no anchor could be trained; {missing[0]}")
    usual = bank(loras, chosen, f"{name}, {own.method}")
    remade = METHODS[own.method].bank
    return chosen, remade(own, users, chosen, usual, setting) if remade else usual


def all_answers(
    common: Common, mergings: Sequence[Merging]
) -> dict[MethodName, tuple[Answers, ...]]:
    """Every method's answers, batch by batch; a batch that one method lacks is left out of all.

    Those of a method that looks at no items are the known ones. A method that has no bank, or
    whose `fit` fails, is left out. Raises StageFailed where no batch is left.
    """
    config, users, missing = common.config, common.users, common.missing
    merged = {name: one.merged for one in mergings for name in one.methods}
    batches = batches_of(users.few_shot_ids, config.stacking.users_per_job)
    able: list[MethodName] = []
    made, jobs = {}, {}
    for name in config.methods:
        own, method, below = config.method(name), METHODS[name], merged.get(name)
        if method.merged and not below:
            continue
        how, setting, fitted = how_answered(own), common.setting(own), None
        with noted(name, missing):
            fitted = method.fit(own, users, setting, below) if method.fit else None
            able.append(name)
        if name not in able:
            continue
        same = common.known if not method.uses_items else None
        before = {one.users: one for one in same.answers.get(name, ())} if same else {}
        for number, batch in enumerate(batches):
            if batch in before:
                made[name, number] = before[batch]
                continue
            with within(f"{name} {number}"):
                given = (how, users.few_shot, batch, below, fitted, setting)
                jobs[name, number] = answers.submit(*given)
    made |= collected(jobs, "answers of", f"{config.name}: methods", missing)
    complete = [n for n in range(len(batches)) if all((name, n) in made for name in able)]
    if not (able and complete):
        raise StageFailed(f"no batch of users could be scored; {missing[0]}")
    missing += [f"{name}, {line}" for (name, _), one in made.items() for line in one.failed]
    return {name: tuple(made[name, number] for number in complete) for name in able}

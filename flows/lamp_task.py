"""One LaMP task under one seed: the method, stage by stage. The work itself is in `tasks/`.

Prepare users, take the base model, embed the users, choose anchors, train their meta-LoRAs, put
these into a bank (or make one from the adapters of `bank.adapters`), find each few-shot user's
recipe. Then, for each method, train the users' LoRAs and answer their queries. Compare.
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
    """What all later stages need. known: a cell with another number of items. missing: a line for
    each piece that failed."""

    config: TaskConfig
    users: Prepared
    base: Base
    known: Cell | None = None
    missing: list[str] = field(default_factory=list)

    def setting(self, options: MethodConfig) -> Setting:
        return setting_of(self.config, options, self.users, self.base)


def lamp_task(config: TaskConfig, known: Cell | None = None) -> Cell:
    """All stages of one LaMP task; a known cell's base model and banks serve again.

    Raises InputError, in one line, if a stage that all others need gives nothing.
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
    """The bank, of anchors or of `bank.adapters`, and every few-shot user's recipe."""
    users, known = common.users, common.known and common.known.merging(methods[0])
    options = common.config.method(methods[0])
    setting = common.setting(options)
    chosen, members = (known.chosen, known.merged.bank) if known else (None, None)
    if options.bank.adapters and not known:
        # First, so that adapters are refused before users are embedded.
        members = own_bank(given_adapters(options.bank), common.base)
    embedded = embedded_users(options, users, setting.questions, common.base, setting.compute)
    if members is None:
        chosen, members = bank_of_anchors(common, options, embedded, setting)
    merged = merged_loras(options.fusion, embedded, members, users.few_shot, setting)
    if remade := METHODS[methods[0]].recipes:
        recipes = remade(options, users, embedded, merged, setting)
        merged = merged.model_copy(update={"recipes": recipes})
    return Merging(methods=methods, embedded=embedded, chosen=chosen, merged=merged)


def bank_of_anchors(
    common: Common, options: MethodConfig, embedded: Embedded, setting: Setting
) -> tuple[Anchors, Bank]:
    """Anchors chosen and trained, and their bank. Raises StageFailed if none can be trained."""
    name, users, missing = common.config.name, common.users, common.missing
    chosen = chosen_anchors(options.anchors, embedded, users.anchor, setting.seed)
    jobs = {}
    for part in batches_of(chosen.anchors, options.anchors.per_job):
        names = tuple(one.name for one in part)
        with within(piece("anchor", names)):
            jobs[names] = meta_lora.submit(options.meta_lora, part, users.anchor, setting)
    made = collected(jobs, "anchor", f"{name}: meta-LoRAs", missing).values()
    missing += [line for job in made for line in job.failed]
    loras = tuple(one for job in made for one in job.loras)
    if not loras:
        raise StageFailed(f"no anchor could be trained; {missing[0]}")
    usual = bank(loras, chosen, f"{name}, {options.method}")
    remade = METHODS[options.method].bank
    return chosen, remade(options, users, chosen, usual, setting) if remade else usual


def all_answers(
    common: Common, mergings: Sequence[Merging]
) -> dict[MethodName, tuple[Answers, ...]]:
    """Every method's answers, batch by batch; a batch that one method lacks is left out of all.

    A method that looks at no items takes the known cell's answers. A method that lacks its bank, or
    whose `fit` fails, is left out. Raises StageFailed if no batch is left.
    """
    config, users, missing = common.config, common.users, common.missing
    merged = {name: one.merged for one in mergings for name in one.methods}
    batches = batches_of(users.few_shot_ids, config.stacking.users_per_job)
    able: list[MethodName] = []
    made, jobs = {}, {}
    for name in config.methods:
        options, method, below = config.method(name), METHODS[name], merged.get(name)
        if method.merged and not below:
            continue
        how, setting, fitted = how_answered(options), common.setting(options), None
        with noted(name, missing):
            fitted = method.fit(options, users, setting, below) if method.fit else None
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
                arguments = (how, users.few_shot, batch, below, fitted, setting)
                jobs[name, number] = answers.submit(*arguments)
    made |= collected(jobs, "answers of", f"{config.name}: methods", missing)
    complete = [n for n in range(len(batches)) if all((name, n) in made for name in able)]
    if not (able and complete):
        raise StageFailed(f"no batch of users could be scored; {missing[0]}")
    missing += [f"{name}, {line}" for (name, _), one in made.items() for line in one.failed]
    return {name: tuple(made[name, number] for number in complete) for name in able}

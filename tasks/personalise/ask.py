"""One prompt to one user's model, asked as the run's own queries are: `mta ask`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tasks.answer import answered, how_answered, weighed
from tasks.errors import InputError, label
from tasks.export import batch_of, cell_of
from tasks.fusion import Merger
from tasks.lamp.folders import SUFFIXES
from tasks.lora.bank import read_bank, stack
from tasks.methods import MethodName
from tasks.personalise.new_users import as_user, histories
from tasks.personalise.personaliser import Personaliser
from tasks.prepare import users_in_order
from tasks.results.run import Cell, Run
from tasks.results.store import store
from tasks.stacking import Adapted, Batch
from tasks.text.questions import User, setting_of


def ask(
    run: Run,
    user: str,
    text: str,
    lamp_task: str | None = None,
    method: MethodName = "mta",
    seed: int | None = None,
    compare: bool = True,
) -> dict[str, str]:
    """The answers to `text` of the base model, with the merged LoRA, and with all of `method`.

    user: a few-shot user's id, or a user file of one user. The keys are `base`, `merged` and
    `stacked`, as far as the user and the method have these: the last is the user's model, and
    without `compare` it alone is asked. text: as the `input` of a query, or what follows the
    instruction in one. Raises InputError where the run has no such user, task, seed or method, or
    the file does not hold one user.
    """
    if not text.strip():
        raise InputError("the text is empty; give what is to be asked")
    cell = cell_of(run, lamp_task, method, seed)
    place = Path(user)
    given = place.is_file() or place.suffix in SUFFIXES
    who, adapted = _of_file(cell, method, place) if given else _of_run(run, cell, method, user)
    ways = {"base": Adapted([], [])}
    if adapted.merger:
        ways["merged"] = replace(adapted, own=None)
    if adapted.own:
        ways["stacked"] = adapted
    if not compare:
        ways = dict([ways.popitem()])
    own = cell.config.method(method)
    query = {"id": "asked", "input": text, "gold": ""}
    setting = setting_of(cell.config, own, cell.users, cell.base)
    batch = Batch([{**who, "query": [query]}], None, None, None, setting)
    how, answers = how_answered(own), dict[str, str]()
    for name, one in ways.items():
        ((chosen, log_p, _),) = answered(how, batch, one, [0])
        if name != "base":
            chosen = weighed(who, chosen, log_p, how, setting.questions.task.labels)
        (answers[name],) = chosen
    return answers


def _of_file(cell: Cell, method: MethodName, file: Path) -> tuple[User, Adapted]:
    users, faults = histories(cell, file)
    if faults:
        raise faults[0]
    if len(users) != 1:
        few = ", ".join(label(one.user_id) for one in users[:5])
        raise InputError(f"--user {file}: holds {len(users)} users ({few}); give a file of one")
    personaliser, user = Personaliser(cell, method), as_user(users[0])
    (personal,) = personaliser([user])
    return user, personaliser.adapted(personal)


def _of_run(run: Run, cell: Cell, method: MethodName, user_id: str) -> tuple[User, Adapted]:
    batch, merging = batch_of(run, cell, method, user_id), cell.merging(method)
    own = None
    if batch.stacked:
        own = stack([user_id], [read_bank(store().path(batch.stacked)).lora(user_id)])
    merger = Merger(merging.merged) if merging and batch.merged else None
    (user,) = users_in_order(cell.users.few_shot, [user_id])
    return user, Adapted([], [], merger, own)

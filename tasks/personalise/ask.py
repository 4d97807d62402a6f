"""One prompt to one user's model, asked as the run's own queries are: `mta ask`."""

from dataclasses import replace
from pathlib import Path

from tasks.answer import answered, how_answered, weighed
from tasks.errors import InputError, label
from tasks.export import Finished
from tasks.lamp.folders import SUFFIXES
from tasks.lamp.formats import History
from tasks.lora.bank import stack
from tasks.personalise.new_users import as_user, histories
from tasks.personalise.personaliser import Personaliser
from tasks.stacking import Adapted, Batch
from tasks.text.questions import User, setting_of
from tasks.users import users_in_order


def ask(finished: Finished, user: str, text: str, compare: bool = True) -> dict[str, str]:
    """The answers to `text` of the base model, with the merged LoRA, and with all of the method.

    user: a few-shot user's id, or a user file of one user. The keys are `base`, `merged` and
    `stacked`, as far as the user and the method have these: the last is the user's model, and
    without `compare` it alone is asked. text: as the `input` of a query, or what follows the
    instruction in one. Raises InputError where the run has no such user, or the file does not hold
    one user.
    """
    if not text.strip():
        raise InputError("the text is empty; give what is to be asked")
    place, cell = Path(user), finished.cell
    in_file = place.is_file() or place.suffix in SUFFIXES
    who, adapted = _of_file(finished, place) if in_file else _of_run(finished, user)
    ways = {"base": Adapted([], [])}
    if adapted.merger:
        ways["merged"] = replace(adapted, loras=None)
    if adapted.loras:
        ways["stacked"] = adapted
    if not compare:
        ways = dict([ways.popitem()])
    config = cell.config.method(finished.method)
    query = {"id": "asked", "input": text, "gold": ""}
    setting = setting_of(cell.config, config, cell.users, cell.base)
    batch = Batch([{**who, "query": [query]}], how_answered(config), None, None, setting)
    answers = dict[str, str]()
    for name, one in ways.items():
        ((chosen, log_p, _),) = answered(batch, one, [0])
        if name != "base":
            chosen = weighed(who, chosen, log_p, batch)
        (answers[name],) = chosen
    return answers


def _of_file(finished: Finished, file: Path) -> tuple[User, Adapted]:
    users: list[History] = []
    for one in histories(finished.cell, file):
        if isinstance(one, InputError):
            raise one
        users.append(one)
    if len(users) != 1:
        few = ", ".join(label(one.user_id) for one in users[:5])
        raise InputError(f"--user {file}: holds {len(users)} users ({few}); give a file of one")
    personaliser, user = Personaliser(finished.cell, finished.method), as_user(users[0])
    (personal,) = personaliser([user])
    return user, personaliser.adapted(personal)


def _of_run(finished: Finished, user_id: str) -> tuple[User, Adapted]:
    merged, lora = finished.batch(user_id).merged, finished.stacked(user_id)
    stacked = stack([user_id], [lora]) if lora else None
    (user,) = users_in_order(finished.cell.users.few_shot, [user_id])
    return user, Adapted([], [], finished.merger if merged else None, stacked)

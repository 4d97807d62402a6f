"""New users from a file to folders: each user's LoRA, or only the recipe, beside one another.

for line in personalise(Finished(read_run("last")), Path("user.json"), Path("personalised")):
    ...  # a line for each user made, an InputError for each that was not
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from tasks.config.task import TaskConfig
from tasks.errors import InputError, label
from tasks.export import Finished, whole_lora, write_folder
from tasks.files import file_name, write_atomic
from tasks.lamp.citations import UNASKED, ask_related
from tasks.lamp.definitions import LampTask
from tasks.lamp.formats import History, read_histories
from tasks.lamp.splits import shown_items
from tasks.results.models import Prepared
from tasks.results.run import Cell
from tasks.text.questions import User
from tasks.users import users_of

if TYPE_CHECKING:
    from tasks.personalise.personaliser import Personal, Personaliser

Keep = Literal["folder", "recipe"]


def personalise(
    finished: Finished, file: Path, to: Path, keep: Keep = "folder"
) -> Iterator[str | InputError]:
    """Make each user of a user file a PEFT folder in `to`, or with keep `recipe` a JSON file.

    Yields a line for each user that was made, and an InputError for what was wrong with another;
    the others are made all the same. Raises InputError where nobody can be made: files are gone.
    """
    from tasks.personalise.personaliser import Personaliser

    read = histories(finished.cell, file)
    yield from (one for one in read if isinstance(one, InputError))
    users = [one for one in read if isinstance(one, History)]
    if not users:
        return
    personaliser = Personaliser(finished.cell, finished.method)
    for user, one in each_made(personaliser, users, to, keep):
        if isinstance(one, InputError):
            yield one
        else:
            yield f"{place_of(to, user, keep)}: {_described(user, one)}"


def each_made(
    personaliser: Personaliser, users: Sequence[History], to: Path | None, keep: Keep
) -> Iterator[tuple[History, Personal | InputError]]:
    """Make each user, and write it into `to` unless that is None; some at once.

    Raises InputError where `to` cannot be made.
    """
    try:
        if to:
            to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--to {to}: cannot be made ({error.strerror}); name another folder"
        ) from error
    each = personaliser.cell.config.stacking.users_per_job
    for start in range(0, len(users), each):
        part = []
        for user in users[start : start + each]:
            if to and (place := place_of(to, user, keep)).exists():
                yield user, InputError(f"{place}: is there already, so {label(user.user_id)} is "
                                       "left out; name a new folder with --to")  # fmt: skip
            else:
                part.append(user)
        made = _made(personaliser, part, bool(to) and keep == "folder") if part else []
        for user, one in zip(part, made, strict=True):
            if to and not isinstance(one, InputError):
                write(place_of(to, user, keep), one, personaliser, keep)
            yield user, one


def place_of(to: Path, user: History, keep: Keep) -> Path:
    """Where a user's folder, or recipe, is written."""
    return to / (file_name(user.user_id) + (".json" if keep == "recipe" else ""))


def histories(cell: Cell, file: Path) -> list[History | InputError]:
    """The users of a file as the run's few-shot users were read; in a user's place what is wrong.

    Of a longer history the items that the run showed of its few-shot users count
    (`split.few_shot_items`).
    """
    config = cell.config
    read = read_histories(file, config.task, config.seed)
    if not read:
        return [InputError(f"{file}: holds an empty list; expected at least one user")]
    shown = shown_items(config.split)
    users = [replace(one, profile=one.profile[shown]) for one in read if isinstance(one, History)]
    asked = iter(_with_questions(config, cell.users, users))
    made = [one if isinstance(one, InputError) else next(asked) for one in read]
    return [_none_usable(file, one, config.task) or one for one in made]


def _none_usable(file: Path, user: History | InputError, task: LampTask) -> InputError | None:
    """What is wrong with a user none of whose items can be used."""
    if isinstance(user, InputError) or user.profile or not user.length:
        return None
    labels = f" ({', '.join(task.labels)})" if task.labels else ""
    return InputError(
        f"{file}: user {label(user.user_id)}: none of {user.length} items can be used; each needs "
        f"{task.text_field} and {task.answer_field}, as {task.name} has them{labels}"
    )


def _with_questions(
    config: TaskConfig, run: Prepared, users: list[History]
) -> list[History] | list[History | InputError]:
    """LaMP-1's papers without a citation get a question each, as in the run (lamp/citations.py)."""
    unasked = [any(item["answer"] == UNASKED for item in user.profile) for user in users]
    if not any(unasked):
        return users
    if not run.few_shot_ids:
        error = InputError(
            "papers without a citation are asked about with papers of the run's other users, which "
            "a registered bank has not; give items with citations, or the run itself"
        )
        return [error if one else user for one, user in zip(unasked, users, strict=True)]

    # A few-shot user of the run has the author that the run found.
    authors = {user["user_id"]: user["group"] for user in users_of(run.few_shot)}
    groups = [authors.get(user.user_id, user.user_id) for user in users]
    frame = pl.DataFrame({"group": groups, "profile": [user.profile for user in users]})
    others = pl.DataFrame([user for table in run.unscored for user in users_of(table)])
    asked, _ = ask_related(frame, others, config.seed)
    pairs = zip(users, asked["profile"].to_list(), strict=True)
    return [replace(user, profile=profile) for user, profile in pairs]


def as_user(history: History) -> User:
    """The record that the stages know."""
    return {"user_id": history.user_id, "profile": history.profile}


def write(place: Path, made: Personal, personaliser: Personaliser, keep: Keep) -> None:
    """Write a user's PEFT folder, or the recipe as JSON."""
    cell, said = personaliser.cell, personaliser.about | {"user": made.user_id}
    if keep == "folder":
        loras = made.loras or ([] if cell.base.adapter else [personaliser.nothing()])
        write_folder(place, whole_lora(cell, loras), cell.base, said)
        return
    values = {**said, "merge": personaliser.run.merged.how, **recipe_values(made)}
    write_atomic(place, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())


def recipe_values(made: Personal) -> dict[str, list[Any]]:
    """Anchors and weights, best first; none of a user without a history."""
    recipe = made.recipe
    anchors, weights = (recipe.anchors, recipe.weights) if recipe else ((), ())
    return {"anchors": [*anchors], "weights": [*weights]}


def _made(
    personaliser: Personaliser, users: Sequence[History], train: bool
) -> list[Personal | InputError]:
    """The users made together or, where that cannot be, one by one: who is at fault is left out."""
    try:
        made = personaliser([as_user(user) for user in users], train)
    except InputError as error:
        if len(users) == 1:
            return [InputError(f"user {label(users[0].user_id)}: {error}")]
        return [one for user in users for one in _made(personaliser, [user], train)]
    why = "the loss of the stacked LoRA stopped being finite; lower stacking.learning_rate in a run"
    return [InputError(f"user {label(one.user_id)}: {why}") if one.failed else one for one in made]


def _described(user: History, made: Personal) -> str:
    name = label(user.user_id)
    if made.recipe is None:
        return f"{name} has an empty history and gets the base model as it is"
    cut = f" of {user.length}" if user.length > len(user.profile) else ""
    items = "item" if user.length == 1 else "items"
    best, weight = label(made.recipe.anchors[0]), made.recipe.weights[0]
    return (
        f"{name}, by {len(user.profile)}{cut} {items}, merged from {len(made.recipe.anchors)} "
        f"anchors, most of {best} ({weight:.2f})"
    )

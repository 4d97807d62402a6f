"""`tune=true`: settings of MTA are chosen on development users, then the run goes on with them.

Development users are candidates, but no base users (tasks/lamp/dataset.py). No few-shot user is
looked at.
Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): all trials are scored on a quarter of
the users, the better half of them on half, and the better half of these on all. A trial that goes
on finds its earlier users in the store. The run's settings are trial 0, which stays to the end.
"""

import random
from dataclasses import replace

from flows.lamp_task import Common, personalised
from tasks.base_model import base_model
from tasks.config.task import TaskConfig
from tasks.config.trials import drawn, with_settings
from tasks.errors import InputError
from tasks.log import log
from tasks.prepare import prepared_users
from tasks.record import derive_seed
from tasks.results.run import Trial, Tuning
from tasks.results.stage import within

TRIALS = 12
# Shares of the development users, rung by rung.
SHARES = (0.25, 0.5, 1.0)
LEAST_USERS = 8


def tuned(config: TaskConfig) -> Tuning:
    """The trials of a cell, and the number of the best one.

    Raises InputError if development users are too few, or the run's settings fail on them.
    """
    split = config.split.model_copy(update={"development": True})
    config = config.model_copy(update={"split": split, "methods": ["mta"]})
    users = prepared_users(config)
    count = len(users.few_shot_ids)
    if count < LEAST_USERS:
        raise InputError(
            f"tune: {count} development users are too few to choose settings on; give "
            f"{2 * LEAST_USERS} anchor candidates or more, beside base users, with three items "
            "each, or leave out tune"
        )
    # In random order: users who are near each other in a file may be alike.
    order = random.Random(derive_seed(config.seed, "tune", "users")).sample(range(count), count)
    ids = tuple(users.few_shot_ids[number] for number in order)
    base, known = base_model(config, users), set[str]()
    trials = [Trial(settings=one) for one in drawn(config, TRIALS)]
    left = list(range(len(trials)))
    for share in SHARES:
        some = users.model_copy(update={"few_shot_ids": ids[: round(share * count)]})
        for number in list(left):
            try:
                with within(f"trial {number}"):
                    trials[number] = scored(Common(config, some, base), trials[number], known)
            except InputError as error:
                if number == 0:
                    raise
                log(f"tune: trial {number} is out: {error}", warning=True)
                left.remove(number)
        # Of equal trials the first, so the run's settings before all others.
        left.sort(key=lambda number: (-trials[number].scores[-1], number))
        if share < 1:
            better = left[: max(len(left) // 2, 2)]
            left = better if 0 in better else [*better[:-1], 0]
    made = Tuning(trials=tuple(trials), chosen=left[0], users=count)
    log(f"{config.name}: {made.text()}")
    return made


def scored(common: Common, trial: Trial, known: set[str]) -> Trial:
    """A trial with its score on these users. known: meta-LoRAs whose seconds are counted already.

    Raises InputError if a piece of the trial is missing.
    """
    cell = personalised(replace(common, config=with_settings(common.config, trial.settings)))
    point, merging = cell.compared.estimate("mta").point, cell.merging("mta")
    if common.missing or point is None or merging is None:
        raise InputError("; ".join(common.missing) or "it has no score")
    seconds = sum(one.seconds for one in cell.answers["mta"])
    for member in merging.merged.bank.members:
        seconds += 0 if member.adapter.uri in known else member.training.seconds
        known.add(member.adapter.uri)
    return trial.model_copy(
        update={
            "scores": (*trial.scores, point),
            "users": (*trial.users, len(common.users.few_shot_ids)),
            "seconds": trial.seconds + seconds,
        }
    )

"""`tune=true`: settings of MTA chosen on development users, before the run that goes on with them.

Development users are anchor candidates (tasks/lamp/dataset.py); no few-shot user is looked at.
Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): all trials are scored on a quarter of
the users, the better half of them on half, and the better half of these on all. What is resumed is
found in the store, user by user. The run's own settings are a trial, and stay to the end.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from flows.lamp_task import all_answers, bank_and_recipes
from tasks.base_model import base_model
from tasks.compare import compared
from tasks.config.task import TaskConfig, derive_seed, overlay
from tasks.errors import InputError
from tasks.log import log
from tasks.prepare import prepared_users
from tasks.results.models import Base, Prepared
from tasks.results.run import Trial, Tuning
from tasks.results.stage import within

# The space, as factors of what the run has: K (of whole clusters, their least size decides it), m,
# the stacked LoRA's rank and learning rate, and the temperature of the weights.
FACTORS: dict[str, tuple[float, ...]] = {
    "anchors.count": (0.5, 1, 2),
    "anchors.min_cluster_size": (1, 1.5, 2),
    "fusion.top_m": (0.25, 0.5, 1, 2),
    "fusion.temperature": (0.3, 1, 3),
    "fusion.evidence_temperature": (0.3, 1, 3),
    "stacking.rank": (0.5, 1, 2),
    "stacking.learning_rate": (0.3, 1, 3),
}
TRIALS = 12
# Of the development users, rung by rung.
SHARES = (0.25, 0.5, 1.0)
LEAST_USERS = 8
Settings = dict[str, dict[str, Any]]


def tuned(config: TaskConfig) -> Tuning:
    """The trials of a cell, and which of them its settings are taken from.

    Raises InputError where development users are too few, or the run's own settings fail on them.
    """
    split = config.split.model_copy(update={"development": True})
    config = config.model_copy(update={"split": split, "methods": ["mta"]})
    users = prepared_users(config)
    count = len(users.few_shot_ids)
    if count < LEAST_USERS:
        raise InputError(
            f"tune: {count} development users are too few to choose settings on; give "
            f"{2 * LEAST_USERS} anchor candidates or more with three items each, or leave out tune"
        )
    # Those who come first in their files may be alike.
    order = random.Random(derive_seed(config.seed, "tune", "users")).sample(range(count), count)
    ids = tuple(users.few_shot_ids[number] for number in order)
    base, known = base_model(config, users), set[str]()
    trials = [Trial(settings=one) for one in drawn(config)]
    left = list(range(len(trials)))
    for share in SHARES:
        some = users.model_copy(update={"few_shot_ids": ids[: round(share * count)]})
        for number in list(left):
            try:
                with within(f"trial {number}"):
                    trials[number] = scored(config, trials[number], some, base, known)
            except InputError as error:
                if number == 0:
                    raise
                log(f"tune: trial {number} is out: {error}", warning=True)
                left.remove(number)
        # The first of equals, so the run's own before all.
        left.sort(key=lambda number: (-trials[number].scores[-1], number))
        if share < 1:
            better = left[: max(len(left) // 2, 2)]
            left = better if 0 in better else [*better[:-1], 0]
    made = Tuning(trials=tuple(trials), chosen=left[0], users=count)
    log(f"{config.name}: {made.text()}")
    return made


def drawn(config: TaskConfig) -> list[Settings]:
    """The settings of all trials: first the run's own, then others of the space, by seed."""
    own = config.method("mta")
    unused = {
        "anchors.min_cluster_size" if own.anchors.train_on == "user" else "anchors.count",
        *(["fusion.temperature"] if own.fusion.weights != "softmax" else []),
        *(["fusion.evidence_temperature"] if not own.fusion.by_evidence else []),
        *(["anchors.count", "anchors.min_cluster_size"] if own.bank.adapters else []),
    }
    space = {name: factors for name, factors in FACTORS.items() if name not in unused}
    choose = random.Random(derive_seed(config.seed, "tune"))
    # Each factor as often as the others of its option.
    columns = [choose.sample((one * TRIALS)[: TRIALS - 1], TRIALS - 1) for one in space.values()]
    found: list[Settings] = [{}]
    for factors in zip(*columns, strict=True):
        settings: Settings = {}
        for name, factor in zip(space, factors, strict=True):
            section, _, option = name.partition(".")
            value = getattr(getattr(own, section), option)
            other = value * factor
            if isinstance(value, int):
                other = max(round(other), 2 if option == "min_cluster_size" else 1)
            if other != value:
                settings.setdefault(section, {})[option] = other
        if rank := settings.get("stacking", {}).get("rank"):
            settings["stacking"]["alpha"] = own.stacking.alpha * rank / own.stacking.rank
        if settings not in found:
            found.append(settings)
    return found


def scored(config: TaskConfig, trial: Trial, users: Prepared, base: Base, known: set[str]) -> Trial:
    """A trial with its score on these users; known: anchors' trainings that are counted.

    Raises InputError where a piece of it is missing.
    """
    own, missing = with_settings(config, trial.settings), list[str]()
    merging = bank_and_recipes(own, ("mta",), users, base, None, missing)
    answers = all_answers(own, ["mta"], users, base, [merging], None, missing)
    point = compared(own, users, answers).estimate("mta").point
    if missing or point is None:
        raise InputError("; ".join(missing) or "it has no score")
    seconds = sum(one.seconds for one in answers["mta"])
    for member in merging.merged.bank.members:
        seconds += 0 if member.adapter.uri in known else member.training.seconds
        known.add(member.adapter.uri)
    return trial.model_copy(
        update={
            "scores": (*trial.scores, point),
            "users": (*trial.users, len(users.few_shot_ids)),
            "seconds": trial.seconds + seconds,
        }
    )


def with_settings(config: TaskConfig, settings: Mapping[str, Any]) -> TaskConfig:
    """The configuration with a trial's settings laid over it."""
    values = overlay(config.model_dump(exclude={"task"}), dict(settings))
    return TaskConfig.model_validate(values | {"task": config.task})

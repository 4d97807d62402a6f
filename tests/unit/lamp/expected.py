"""What the three predictors of a generated world are expected to score: exact sums, no texts.

Another way to the numbers that tasks/lamp/synthetic/optimum.py reaches by answering queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tasks.lamp.definitions import get_task
from tasks.lamp.options import SyntheticOptions
from tasks.lamp.synthetic.family import Floats
from tasks.lamp.synthetic.optimum import PREDICTORS, posterior_of
from tasks.lamp.synthetic.world import Taste, World

NO_ITEMS = np.empty((0, 3), dtype=np.int64)


@dataclass(frozen=True)
class Score:
    """A mean of the main metric, and its standard error over users; 0 where it is exact."""

    mean: float
    error: float


def expected_scores(
    lamp_task: str, options: SyntheticOptions, seed: int, k: int, users: int = 1000
) -> dict[str, Score]:
    """The expected main metric of the three predictors in one world (accuracy, MAE or ROUGE-L).

    k: items that `bayes` sees. users: freshly drawn ones (none that the files hold), the mean over
    whom is `bayes`; for each the score is exact given the user's items and truth, over all themes,
    contexts and answers. `nonpersonal` and `oracle` are exact sums, with error 0.
    Raises InputError as `World`, ValueError for a negative k or fewer than two users.
    """
    if k < 0 or users < 2:
        raise ValueError(f"k {k} must be >= 0 and users {users} >= 2")
    world = World(lamp_task, options.model_copy(update={"few_shot_items": k}), seed)
    joint, gain = world.joint, world.family.gain
    unknown = posterior_of(world, NO_ITEMS)
    nonpersonal = _best_of(np.einsum("sav,avcy->scy", unknown, joint), gain).mean()
    by_value = _best_of(joint, gain)  # [A, C]
    oracle = (unknown * by_value).sum(axis=(1, 2)).mean()
    scores: list[float] = []
    for index in range(users):
        taste, items, _ = world.draw("fresh", index)
        scores.append(realised(world, posterior_of(world, items), taste))
    bayes = Score(float(np.mean(scores)), float(np.std(scores, ddof=1) / math.sqrt(users)))
    sign = -1.0 if get_task(lamp_task).kind == "rating" else 1.0
    found = (Score(float(nonpersonal), 0.0), bayes, Score(float(oracle), 0.0))
    return {
        name: Score(sign * score.mean, score.error)
        for name, score in zip(PREDICTORS, found, strict=True)
    }


def realised(world: World, belief: Floats, taste: Taste) -> float:
    """Expected score, over all queries of a user of this taste, of answering by `belief` [S, A, C].

    Exact given the two: each theme is equally likely, contexts and answers follow the table.
    """
    joint, gain = world.joint, world.family.gain
    outcomes = np.einsum("sav,avcy->scy", belief, joint)
    said = (outcomes @ gain.T).argmax(axis=-1)  # [S, contexts]
    truly = joint[taste.first, taste.values]  # [S, contexts, answers]
    return float((truly * gain[said]).sum() / len(said))


def _best_of(outcomes: Floats, gain: Floats) -> Floats:
    """[..]: sum over contexts of the best candidate's score; outcomes [.., contexts, answers]."""
    return (outcomes @ gain.T).max(axis=-1).sum(axis=-1)

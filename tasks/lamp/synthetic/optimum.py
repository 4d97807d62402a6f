"""The best answers in a synthetic world: without the user, from k items, and from the truth.

Three predictors know the population (archetypes, vocabulary, options). `nonpersonal` knows nothing
of the user, `bayes` the user's first k items, `oracle` the user's first archetype and values. Each
says the candidate of highest expected score under its posterior over (first archetype, value):

    argmax_c  sum_y gain[c, y] p(y | theme, context, what is known)

where the score is the task's main metric: accuracy, minus the absolute error (so ratings are the
posterior's medians), ROUGE-L. No method can be expected to do better from the same knowledge.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tasks.errors import InputError
from tasks.lamp.definitions import get_task
from tasks.lamp.formats import read_users
from tasks.lamp.options import SyntheticOptions
from tasks.lamp.prompts import question_text
from tasks.lamp.synthetic.family import Reading
from tasks.lamp.synthetic.population import Floats, Ints, Taste
from tasks.lamp.synthetic.world import TRUTH_FILE, World

PREDICTORS = ("nonpersonal", "bayes", "oracle")


def optimal_answers(folder: Path | str, items: int | None = None) -> pl.DataFrame:
    """The answers of the three predictors to the few-shot users' queries of a written world.

    folder: of `write_synthetic`. items: how many items of each profile `bayes` sees; None: all.
    truth.json gives the population, and for `oracle` the user's truth; themes, contexts and answers
    are read from the texts.

    Returns columns query_id, user_id, nonpersonal, bayes, oracle (answers, strings), and promised:
    the score that `bayes` expects of its answer, for a rating minus the absolute error.
    Raises InputError when the folder holds no synthetic world, or one of other texts.
    """
    folder = Path(folder)
    truth = read_truth(folder)
    world = World(
        truth["lamp_task"], SyntheticOptions.model_validate(truth["options"]), truth["seed"]
    )
    if truth["archetypes"] != world.population.archetypes.tolist():
        raise InputError(
            f"{folder}: {TRUTH_FILE} was written by another version; write the world again"
        )
    task = get_task(truth["lamp_task"])
    users = read_users(folder, task).users.filter(pl.col("role") == "few_shot")
    unknown = posterior_of(world, [[]])[0]
    rows = []
    for user_id, profile, queries in users.select("user_id", "profile", "query").iter_rows():
        seen = [read_item(world, item) for item in profile[:items]]
        known = posterior_of(world, [seen])[0]
        told = truth["users"][user_id]
        first, second = told["archetypes"]
        taste = Taste(first, second, told["mixture"], np.array(told["values"]))
        beliefs = (unknown, known, certain(world, taste))
        for query in queries:
            reading = world.family.read(question_text(query["input"], task))
            row: dict[str, Any] = {"query_id": query["id"], "user_id": user_id}
            for name, belief in zip(PREDICTORS, beliefs, strict=True):
                gains = expected_gains(world, belief[reading.theme])[reading.context]
                best = int(gains.argmax())
                row[name] = world.family.candidate(reading, best)
                if name == "bayes":
                    row["promised"] = float(gains[best])
            rows.append(row)
    names = ("query_id", "user_id", *PREDICTORS)
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String) | {"promised": pl.Float64})


def read_truth(folder: Path) -> dict[str, Any]:
    """truth.json of a synthetic world; raises InputError when it is not one."""
    truth = json.loads((folder / TRUTH_FILE).read_text("utf-8"))
    if not isinstance(truth, dict) or not {"lamp_task", "options", "seed"} <= truth.keys():
        raise InputError(f"{folder}: {TRUTH_FILE} is not that of a synthetic world")
    return truth


def read_item(world: World, item: dict[str, str]) -> tuple[int, int, int]:
    """Theme, context and answer (numbers) of a profile item {text, answer}."""
    reading: Reading = world.family.read(item["text"])
    return reading.theme, reading.context, world.family.answers(reading).index(item["answer"])


def posterior_of(world: World, seen: Sequence[Sequence[tuple[int, int, int]]]) -> Floats:
    """[U, S, A, C]: p(first archetype, value | items) by theme; as many items for each user.

    seen: per user, (theme, context, answer) of each item.
    """
    items: Ints = np.array(seen, dtype=np.int64).reshape(len(seen), -1, 3)
    # The table's axes [A, C, contexts, answers], looked up at two: [A, C, U, k].
    likelihoods = world.family.joint[:, :, items[..., 1], items[..., 2]]
    return world.population.posterior(items[..., 0], np.moveaxis(likelihoods, (0, 1), (2, 3)))


def certain(world: World, taste: Taste) -> Floats:
    """[S, A, C]: the belief that is certain of the user's first archetype and values."""
    options = world.options
    belief = np.zeros((options.themes, options.archetypes, options.choices))
    belief[np.arange(options.themes), taste.first, taste.values] = 1.0
    return belief


def expected_gains(world: World, belief: Floats) -> Floats:
    """[contexts, candidates]: expected score of each candidate, given the context.

    belief [A, C]: over (first archetype, value) of one theme. The context is evidence too.
    """
    outcomes = np.einsum("av,avcy->cy", belief, world.family.joint)
    seen = outcomes.sum(axis=1, keepdims=True)
    return (outcomes / np.where(seen > 0, seen, 1.0)) @ world.family.gain.T

"""The best answers in a synthetic world: without the user, from k items, and from the truth.

Three predictors know the population (archetypes, vocabulary, options). `nonpersonal` knows nothing
of the user, `bayes` the user's first k items, `oracle` the user's first archetype and values. Each
says the candidate of highest expected score under its posterior over (first archetype, value):

    argmax_c  sum_y gain[c, y] p(y | theme, context, what is known)

where the score is the task's main metric: accuracy, minus the absolute error (so ratings are the
posterior's medians), ROUGE-L. No method can be expected to do better from the same knowledge.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from tasks.lamp.synthetic.population import Floats, Ints
from tasks.lamp.synthetic.world import User, World

PREDICTORS = ("nonpersonal", "bayes", "oracle")


def optimal_answers(world: World, items: int | None = None) -> pl.DataFrame:
    """The answers of the three predictors to the few-shot users' queries.

    items: how many items of each profile `bayes` sees; None: all. Returns columns query_id,
    user_id, nonpersonal, bayes, oracle (answers, strings), and promised: the score that `bayes`
    expects of its answer, for a rating minus the absolute error.
    """
    unknown = posterior_of(world, np.empty((0, 3), np.int64))
    users = world.users("few_shot")
    rows = [row for user in users for row in answers_to(world, user, items, unknown)]
    names = ("query_id", "user_id", *PREDICTORS)
    return pl.DataFrame(rows, dict.fromkeys(names, pl.String) | {"promised": pl.Float64})


def answers_to(
    world: World, user: User, items: int | None, unknown: Floats
) -> list[dict[str, Any]]:
    """One user's rows of `optimal_answers`. unknown: `posterior_of` no items."""
    taste = user.taste
    certain = np.zeros_like(unknown)
    certain[np.arange(len(certain)), taste.first, taste.values] = 1.0
    beliefs = (unknown, posterior_of(world, user.items[:items]), certain)
    rows = []
    asked = zip(user.asked.items(), user.queries.tolist(), strict=True)
    for (query_id, written), (theme, context, _) in asked:
        gains = [expected_gains(world, belief[theme])[context] for belief in beliefs]
        said = [written.candidate(int(own.argmax())) for own in gains]
        row = {"query_id": query_id, "user_id": user.id, "promised": float(gains[1].max())}
        rows.append(row | dict(zip(PREDICTORS, said, strict=True)))
    return rows


def posterior_of(world: World, items: Ints) -> Floats:
    """[S, A, C]: p(first archetype, value | items [k, 3]) by theme."""
    themes, contexts, answers = items.T
    # The table's axes [A, C, contexts, answers], looked up at two: [A, C, k].
    likelihoods = world.joint[:, :, contexts, answers]
    return world.population.posterior(themes, np.moveaxis(likelihoods, -1, 0))


def expected_gains(world: World, belief: Floats) -> Floats:
    """[contexts, candidates]: expected score of each candidate, given the context.

    belief [A, C]: over (first archetype, value) of one theme. The context is evidence too.
    """
    outcomes = np.einsum("av,avcy->cy", belief, world.joint)
    seen = outcomes.sum(axis=1, keepdims=True)
    gains: Floats = (outcomes / np.where(seen > 0, seen, 1.0)) @ world.family.gain.T
    return gains

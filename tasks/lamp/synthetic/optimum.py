"""The best answers in a synthetic world: without the user, from k items, and from the truth.

Three predictors know the population (archetypes, vocabulary, options). `nonpersonal` knows nothing
of the user, `bayes` the user's first k items, `oracle` the user's first archetype and values. Each
says the candidate of highest expected score under its posterior over (first archetype, value):

    argmax_c  sum_y gain[c, y] p(y | theme, context, what is known)

where the score is the task's main metric: accuracy, minus the absolute error (so ratings are the
posterior's medians), ROUGE-L. No method can be expected to do better from the same knowledge.
"""

from typing import Any

import numpy as np
import polars as pl

from tasks.errors import InputError
from tasks.lamp.synthetic.family import Floats, Ints
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
        said = [written.candidate(int(gain.argmax())) for gain in gains]
        row = {"query_id": query_id, "user_id": user.id, "promised": float(gains[1].max())}
        rows.append(row | dict(zip(PREDICTORS, said, strict=True)))
    return rows


def posterior_of(world: World, items: Ints) -> Floats:
    """[S, A, C]: p(first archetype, value | items [k, 3]) by theme; k may be 0.

    Raises InputError when the items cannot come from this world.
    """
    count, size = world.archetypes.shape
    # By ordered pair (z1, z2), [P]; by z1.
    first, second = np.nonzero(~np.eye(count, dtype=bool))
    prior, weights = _prior(world, first, second, len(items))
    # evidence [S, A, C]: the product over a theme's items, each scaled to 1 at most so that
    # long histories do not underflow.
    evidence = np.ones((size, count, world.options.choices))
    for theme, context, answer in items:
        likelihood = world.joint[:, :, context, answer]
        evidence[theme] *= likelihood / (likelihood.max() or 1.0)
    by_pair = evidence[:, first]  # [S, P, C]
    factors = np.einsum("pgsv,spv->spg", prior, by_pair, optimize=True)
    with np.errstate(divide="ignore"):
        log_weight = np.log(factors).sum(axis=0) + np.log(weights)
    if not np.isfinite(log_weight.max()):
        raise InputError("a user's items cannot come from this synthetic world")
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    # p(pair, m, v | items) = p(pair, m | items) p(v | pair, m) evidence(v) / factor
    share = np.divide(weight, factors, out=np.zeros_like(factors), where=factors > 0)
    joint = np.einsum("spg,pgsv->spv", share, prior, optimize=True) * by_pair
    by_first: Floats = joint.reshape(size, count, count - 1, -1).sum(axis=2)
    return by_first


def _prior(world: World, first: Ints, second: Ints, items: int) -> tuple[Floats, Floats]:
    """p(v | pair, m) [P, G, S, C] at the nodes of m, and the nodes' weights [G] (sum 1)."""
    # A user's evidence is a product with one factor per theme that has an item, each linear in
    # m; a query adds or replaces one. So it is a polynomial in m of degree min(items + 1, S) at
    # most, and G Gauss-Legendre nodes are exact up to 2 G - 1.
    options = world.options
    degree = min(items + 1, options.themes)
    nodes, weights = np.polynomial.legendre.leggauss(degree // 2 + 1)
    mixtures = options.mixture_min + (1.0 - options.mixture_min) * (nodes + 1.0) / 2.0
    is_value = np.eye(options.choices)[world.archetypes]  # [A, S, C]
    m = mixtures[None, :, None, None]
    follows = m * is_value[first][:, None] + (1.0 - m) * is_value[second][:, None]
    prior = options.quirk / options.choices + (1.0 - options.quirk) * follows
    return prior, weights / weights.sum()


def expected_gains(world: World, belief: Floats) -> Floats:
    """[contexts, candidates]: expected score of each candidate, given the context.

    belief [A, C]: over (first archetype, value) of one theme. The context is evidence too.
    """
    outcomes = np.einsum("av,avcy->cy", belief, world.joint)
    seen = outcomes.sum(axis=1, keepdims=True)
    gains: Floats = (outcomes / np.where(seen > 0, seen, 1.0)) @ world.family.gain.T
    return gains

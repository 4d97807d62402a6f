"""The users of a synthetic world, and the exact posterior about a user from a few items.

A world has S themes, A archetypes and C choices. An archetype has one value 0..C-1 per theme. A
user has a first archetype z1, a second z2 != z1 (every ordered pair equally likely), a mixture
m ~ U[mixture_min, 1], and per theme a value v, drawn once:

    p(v | z1, z2, m) = quirk / C + (1 - quirk) (m [v = a(z1)] + (1 - m) [v = a(z2)])

An item has a uniform theme; its context c (what the text says beside the theme) and its answer y
follow a table p(c, y | z1, v) of the LaMP task (`family.Family.joint`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Taste:
    """The truth about one user. values: [S], the user's value per theme."""

    first: int
    second: int
    mixture: float
    values: Ints


@dataclass(frozen=True)
class Population:
    """archetypes: [A, S] values 0..choices-1. choices: C. mixture_min, quirk: as in the module."""

    archetypes: Ints
    choices: int
    mixture_min: float
    quirk: float

    def draw_taste(self, generator: np.random.Generator) -> Taste:
        """One user."""
        count, themes = self.archetypes.shape
        first, second = (int(z) for z in generator.permutation(count)[:2])
        mixture = float(generator.uniform(self.mixture_min, 1.0))
        quirky = generator.random(themes) < self.quirk
        by_first = generator.random(themes) < mixture
        follows = np.where(by_first, self.archetypes[first], self.archetypes[second])
        own = generator.integers(self.choices, size=themes)
        return Taste(first, second, mixture, np.where(quirky, own, follows))

    def posterior(self, themes: Ints, likelihoods: Floats) -> Floats:
        """[S, A, C]: p(z1, v of the theme | the user's items), for every theme.

        themes [k]: the items' themes. likelihoods [k, A, C]: p(item's context and answer | z1, v),
        up to a factor of the item's own. k = 0 gives what is known of a user without items.
        Raises InputError when the items cannot come from this population.
        """
        count, size = self.archetypes.shape
        # By ordered pair (z1, z2), [P]; by z1.
        first, second = np.nonzero(~np.eye(count, dtype=bool))
        prior, weights = self._prior(first, second, len(themes))
        # evidence [S, A, C]: the product over a theme's items, each scaled to 1 at most so that
        # long histories do not underflow.
        evidence = np.ones((size, count, self.choices))
        for theme, likelihood in zip(themes, likelihoods, strict=True):
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
        by_first: Floats = joint.reshape(size, count, count - 1, self.choices).sum(axis=2)
        return by_first

    def _prior(self, first: Ints, second: Ints, items: int) -> tuple[Floats, Floats]:
        """p(v | pair, m) [P, G, S, C] at the nodes of m, and the nodes' weights [G] (sum 1)."""
        # A user's evidence is a product with one factor per theme that has an item, each linear in
        # m; a query adds or replaces one. So it is a polynomial in m of degree min(items + 1, S) at
        # most, and G Gauss-Legendre nodes are exact up to 2 G - 1.
        degree = min(items + 1, self.archetypes.shape[1])
        nodes, weights = np.polynomial.legendre.leggauss(degree // 2 + 1)
        mixtures = self.mixture_min + (1.0 - self.mixture_min) * (nodes + 1.0) / 2.0
        is_value = np.eye(self.choices)[self.archetypes]  # [A, S, C]
        m = mixtures[None, :, None, None]
        follows = m * is_value[first][:, None] + (1.0 - m) * is_value[second][:, None]
        return self.quirk / self.choices + (1.0 - self.quirk) * follows, weights / weights.sum()

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
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tasks.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# The most numbers in an array of `posterior`; users are taken in parts.
MOST_NUMBERS = 4_000_000


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

    @property
    def themes(self) -> int:
        return self.archetypes.shape[1]

    def draw_taste(self, generator: np.random.Generator) -> Taste:
        """One user."""
        first, second = (int(z) for z in generator.permutation(len(self.archetypes))[:2])
        mixture = float(generator.uniform(self.mixture_min, 1.0))
        quirky = generator.random(self.themes) < self.quirk
        by_first = generator.random(self.themes) < mixture
        follows = np.where(by_first, self.archetypes[first], self.archetypes[second])
        own = generator.integers(self.choices, size=self.themes)
        return Taste(first, second, mixture, np.where(quirky, own, follows))

    @cached_property
    def _first(self) -> Ints:
        """[P]: z1 of every ordered pair, by z1."""
        count = len(self.archetypes)
        return np.repeat(np.arange(count), count - 1)

    def _prior(self, items: int) -> tuple[Floats, Floats]:
        """p(v | pair, m) [P, G, S, C] at the nodes of m, and the nodes' weights [G] (sum 1)."""
        # A user's evidence is a product with one factor per theme, each linear in m, those without
        # an item equal to 1; a query adds a factor or replaces one. So it is a polynomial in m of
        # degree min(items + 1, S) at most, and G Gauss-Legendre nodes are exact up to 2 G - 1.
        degree = min(items + 1, self.themes)
        nodes, weights = np.polynomial.legendre.leggauss(degree // 2 + 1)
        mixtures = self.mixture_min + (1.0 - self.mixture_min) * (nodes + 1.0) / 2.0
        count = len(self.archetypes)
        second = np.array([b for a in range(count) for b in range(count) if b != a])
        is_value = np.eye(self.choices)[self.archetypes]  # [A, S, C]
        m = mixtures[None, :, None, None]
        follows = m * is_value[self._first][:, None] + (1.0 - m) * is_value[second][:, None]
        return self.quirk / self.choices + (1.0 - self.quirk) * follows, weights / weights.sum()

    def posterior(self, themes: Ints, likelihoods: Floats) -> Floats:
        """[U, S, A, C]: p(z1, v of the theme | the user's items), for every theme.

        themes [U, k]: the items' themes. likelihoods [U, k, A, C]: p(item's context and answer |
        z1, v), up to a factor of the item's own. k = 0 gives what is known of a user without items.
        Raises InputError when some user's items cannot come from this population.
        """
        users, items = themes.shape
        prior, weights = self._prior(items)
        pairs, nodes = prior.shape[:2]
        per_user = self.themes * pairs * max(nodes, self.choices)
        size = max(1, MOST_NUMBERS // per_user)
        parts = [
            self._part(themes[start : start + size], likelihoods[start : start + size], prior,
                       weights)
            for start in range(0, users, size)
        ]  # fmt: skip
        return np.concatenate(parts)

    def _part(self, themes: Ints, likelihoods: Floats, prior: Floats, weights: Floats) -> Floats:
        users, items = themes.shape
        count = len(self.archetypes)
        # evidence [U, S, A, C]: the product over a theme's items, each scaled to 1 at most so that
        # long histories do not underflow.
        evidence = np.ones((users, self.themes, count, self.choices))
        rows = np.arange(users)
        for item in range(items):
            likelihood = likelihoods[:, item]
            scale = likelihood.max(axis=(1, 2), keepdims=True)
            evidence[rows, themes[:, item]] *= likelihood / np.where(scale > 0, scale, 1.0)
        by_pair = evidence[:, :, self._first]  # [U, S, P, C]
        factors = np.einsum("pgsv,uspv->uspg", prior, by_pair, optimize=True)
        with np.errstate(divide="ignore"):
            log_weight = np.log(factors).sum(axis=1) + np.log(weights)
        highest = log_weight.max(axis=(1, 2), keepdims=True)
        if not np.isfinite(highest).all():
            raise InputError(
                "some user's items cannot come from this synthetic world; give files that belong "
                "to its truth.json"
            )
        weight = np.exp(log_weight - highest)
        weight /= weight.sum(axis=(1, 2), keepdims=True)
        # p(pair, m, v | items) = p(pair, m | items) p(v | pair, m) evidence(v) / factor
        share = np.divide(weight[:, None], factors, out=np.zeros_like(factors), where=factors > 0)
        joint = np.einsum("uspg,pgsv->uspv", share, prior, optimize=True) * by_pair
        joint = joint.reshape(users, self.themes, count, count - 1, self.choices)
        return joint.sum(axis=3)

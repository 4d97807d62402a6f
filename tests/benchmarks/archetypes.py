"""What is true of a generated world and no run sees: whose item an archetype answered, and how
likely each archetype is, given a user's items."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from tasks.lamp.synthetic import World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tasks.config.task import TaskConfig
    from tasks.lamp.synthetic import User
    from tasks.lamp.synthetic.family import Floats

NODES = 16


def dealt(config: TaskConfig, table: pl.DataFrame, items: bool) -> tuple[pl.DataFrame, list[int]]:
    """Candidates, and the archetype of each row.

    table: of a side (tasks/lamp/tables.py). Whole, everybody is of their first archetype. With
    `items` there is a row per user and archetype, which has the items whose value is that
    archetype's; the first one's where both have it, nobody's where the value is a quirk.
    """
    world = World(config.lamp_task, config.synthetic, config.seed)
    by_id = {user.id: user for role in ("base", "anchor") for user in world.users(role)}
    if not items:
        return table, [by_id[name].taste.first for name in table["user_id"]]
    rows, archetypes = [], []
    for row in table.to_dicts():
        user = by_id[row["user_id"]]
        by = answered_by(world, user)
        for archetype in (user.taste.first, user.taste.second):
            profile = [one for one in row["profile"] if by[one["id"]] == archetype]
            if profile:
                rows.append({**row, "user_id": f"{user.id}-{archetype}", "profile": profile})
                archetypes.append(archetype)
    order = sorted(range(len(rows)), key=lambda number: rows[number]["user_id"])
    found = pl.DataFrame([rows[number] for number in order], schema=table.schema)
    return found, [archetypes[number] for number in order]


def answered_by(world: World, user: User) -> dict[str, int | None]:
    """Item id -> the user's archetype whose value it shows."""
    archetypes, taste = world.archetypes, user.taste
    found = {}
    for name, theme in zip(user.profile, user.items[:, 0], strict=True):
        own = [
            a for a in (taste.first, taste.second) if archetypes[a, theme] == taste.values[theme]
        ]
        found[name] = own[0] if own else None
    return found


def weights(config: TaskConfig, ids: Sequence[str]) -> Floats:
    """[U, A]: the expected share of each archetype in a few-shot user, given the items shown.

    E[m [z1 = a] + (1 - m) [z2 = a] | items], by the world's own prior (synthetic/world.py).
    """
    world = World(config.lamp_task, config.synthetic, config.seed)
    by_id = {user.id: user for user in world.users("few_shot")}
    return np.stack([shares(world, by_id[name], config.split.few_shot_items) for name in ids])


def shares(world: World, user: User, items: int | None) -> Floats:
    """[A]: those of one user, by the first `items` of the user's items."""
    options, archetypes = world.options, world.archetypes
    count = len(archetypes)
    first, second = np.nonzero(~np.eye(count, dtype=bool))  # ordered pairs [P]
    nodes, node_weights = np.polynomial.legendre.leggauss(NODES)
    mixtures = options.mixture_min + (1 - options.mixture_min) * (nodes + 1) / 2  # [G]
    log_p = np.tile(np.log(node_weights), (len(first), 1))  # [P, G]
    shown = user.items[:items]
    m = mixtures[None, :, None]
    for theme in np.unique(shown[:, 0]):
        own = shown[shown[:, 0] == theme]
        likelihood = world.joint[:, :, own[:, 1], own[:, 2]].prod(axis=-1)  # [A, C]
        value = np.eye(options.choices)[archetypes[:, theme]]  # [A, C]
        prior = m * value[first][:, None] + (1 - m) * value[second][:, None]
        prior = options.quirk / options.choices + (1 - options.quirk) * prior
        with np.errstate(divide="ignore"):
            log_p += np.log((prior * likelihood[first][:, None]).sum(axis=-1))
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    found = np.zeros(count)
    np.add.at(found, first, (p * mixtures).sum(axis=1))
    np.add.at(found, second, (p * (1 - mixtures)).sum(axis=1))
    return found

"""The settings of MTA that `tune` tries (flows/tune.py)."""

import random
from collections.abc import Mapping
from typing import Any

from tasks.config.task import TaskConfig, overlay
from tasks.record import derive_seed

# The space, as factors of the run's own values: K (for whole clusters, their smallest size), m, the
# temperature of the weights, and the stacked LoRA's rank and learning rate.
FACTORS: dict[str, tuple[float, ...]] = {
    "anchors.count": (0.5, 1, 2),
    "anchors.min_cluster_size": (1, 1.5, 2),
    "fusion.top_m": (0.25, 0.5, 1, 2),
    "fusion.temperature": (0.3, 1, 3),
    "fusion.evidence_temperature": (0.3, 1, 3),
    "stacking.rank": (0.5, 1, 2),
    "stacking.learning_rate": (0.3, 1, 3),
}
Settings = dict[str, dict[str, Any]]


def drawn(config: TaskConfig, trials: int) -> list[Settings]:
    """The settings of `trials` trials: first the run's own, then others of the space, by seed."""
    mta = config.method("mta")
    unused = {
        "anchors.min_cluster_size" if mta.anchors.train_on == "user" else "anchors.count",
        *(["fusion.temperature"] if mta.fusion.weights != "softmax" else []),
        *(["fusion.evidence_temperature"] if not mta.fusion.by_evidence else []),
        *(["anchors.count", "anchors.min_cluster_size"] if mta.bank.adapters else []),
    }
    space = {name: factors for name, factors in FACTORS.items() if name not in unused}
    choose, others = random.Random(derive_seed(config.seed, "tune")), trials - 1
    # The factors of an option are drawn equally often.
    columns = [choose.sample((one * trials)[:others], others) for one in space.values()]
    chosen: list[Settings] = [{}]
    for factors in zip(*columns, strict=True):
        settings: Settings = {}
        for name, factor in zip(space, factors, strict=True):
            section, _, option = name.partition(".")
            value = getattr(getattr(mta, section), option)
            other = value * factor
            if isinstance(value, int):
                other = max(round(other), 2 if option == "min_cluster_size" else 1)
            if other != value:
                settings.setdefault(section, {})[option] = other
        if rank := settings.get("stacking", {}).get("rank"):
            settings["stacking"]["alpha"] = mta.stacking.alpha * rank / mta.stacking.rank
        if settings not in chosen:
            chosen.append(settings)
    return chosen


def with_settings(config: TaskConfig, settings: Mapping[str, Any]) -> TaskConfig:
    """The configuration with a trial's settings laid over it."""
    if not settings:
        return config
    values = overlay(config.model_dump(exclude={"task"}), dict(settings))
    return TaskConfig.model_validate(values | {"task": config.task})

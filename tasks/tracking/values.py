"""What MLflow gets of a run's summaries: names, texts and numbers, as it takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tasks.errors import masked

# A cluster's LoRA has thousands of steps. Of the 33 s that MLflow took for a run that finds
# everything, the losses of LaMP-1's ten took 6, and no chart shows so many. The piece in the store
# has them all.
LOSS_POINTS = 200


def scope(summary: dict[str, Any]) -> str:
    """What a summary is of, as a name: the LaMP task, and the seed where a run has several."""
    name: str = summary["lamp_task"]
    return f"{name} seed {summary['seed']}" if summary["several_seeds"] else name


def manifest(summary: dict[str, Any]) -> dict[str, Any]:
    """Which result came from where: every stage's reference, and whether it was found or made."""
    stages: dict[str, Any] = {}
    for name in ("prepared", "base", "compared"):
        stages[name] = _came_from(summary[name])
    if "adapter" in summary["base"]:
        stages["task_adapt"] = _came_from(summary["base"]["adapter"])
    stages["banks"] = {
        method: {
            **{
                name: _came_from(own[name])
                for name in ("embedded", "anchors", "bank", "evidence", "fusion", "map")
                if own[name]
            },
            "meta_loras": {k: _came_from(item) for k, item in own["meta_loras"].items()},
        }
        for method, own in summary["banks"].items()
    }
    stages["bank_of"] = summary["bank_of"]
    for name in ("stacking", "answered"):
        stages[name] = {
            method: [_came_from(part) for part in parts] for method, parts in summary[name].items()
        }
    stages["scores"] = {method: _came_from(item) for method, item in summary["scores"].items()}
    return {"lamp_task": summary["lamp_task"], "stages": stages, "missing": summary["missing"]}


def _came_from(result: dict[str, Any]) -> dict[str, Any]:
    return {**result["ref"], "cached": result["cached"], "seconds": result["notes"]["seconds"]}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as `section.field` -> value."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def texts(params: dict[str, Any]) -> dict[str, str]:
    """As MLflow takes parameters: texts that are not too long."""
    return {name: masked(str(value))[:500] for name, value in params.items()}


def thinned(losses: Sequence[float], most: int = LOSS_POINTS) -> list[tuple[int, float]]:
    """(step, loss) of at most `most` points: each the mean of equally many steps, at the last.

    The last point may stand for fewer. A list that is short enough stays as it is.
    """
    size = -(-len(losses) // most)
    parts = [losses[start : start + size] for start in range(0, len(losses), max(size, 1))]
    return [
        (min((number + 1) * size, len(losses)), sum(part) / len(part))
        for number, part in enumerate(parts)
    ]

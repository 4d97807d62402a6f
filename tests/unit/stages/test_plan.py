"""A plan against the run that it is of: steps, tokens, FLOPs, memory and disk, stage by stage.

The stages run on a small model and a few users; torch's own counters count what is multiplied and
allocated while they do, and the store is weighed. A plan has to be within a fifth.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import embedding, evidence, meta_lora, refit, scoring, stacking, task_adapt
from tasks.config import RunConfig
from tasks.methods import MethodName
from tasks.plan.model import Planned, planned
from tasks.plan.stages import TaskPlan, plan_task
from tasks.plan.work import Work
from tasks.stage import store
from tests.unit.lora.counters import flops, peak_bytes
from tests.unit.lora.helpers import tiny_base
from tests.unit.stages.pipeline import prepared_place, run
from tests.unit.stages.users import result, user

TASK = "LaMP-2M"
METHODS: list[MethodName] = ["base", "merge_only", "mta"]
ROLES = {
    "base": [user("base-1", 3, queries=4), user("base-2", 3, queries=2)],
    "anchor": [user(f"anchor-{n}", 3 + 4 * n) for n in range(4)],
    "few_shot": [user(f"few-{n}", 4 + n, queries=4) for n in range(5)],
}
ANCHORS = {"count": 3, "min_items": 4, "min_cluster_size": 2}
# Three ways through the pipeline: so that together every stage is run in every way. One cluster,
# of all four candidates, is also what a plan assumes.
WAYS: dict[str, dict[str, Any]] = {
    "cosine": {"anchors": {"train_on": "user", **ANCHORS}},
    "evidence": {
        "anchors": {"train_on": "user", "text_model": "base", "embedding": "text", **ANCHORS},
        "fusion": {"weights": "evidence", "top_m": 2, "merge": "factors"},
        "scoring": {"answer": "likelihood"},
        "base": {"task_adapt": {"enabled": True, "batch_size": 2, "learning_rate": 1e-3}},
    },
    "clusters": {
        "anchors": ANCHORS
        | {"train_on": "cluster", "clustering": "kmeans", "count": 1, "refits": 1},
    },
}


class Case:
    """One run that is done, and the plan of it."""

    def __init__(self, place: Path, given: dict[str, Any]) -> None:
        # More threads would wait for each other.
        self.done = run(place, ROLES, compute={"device": "cpu", "threads": 1}, **dict(given))
        config = RunConfig.model_validate(self.done["config"])
        self.options = config.model_copy(update={"methods": METHODS})
        self.model: Planned = planned(self.options)
        self.plan: TaskPlan = plan_task(
            self.options, TASK, self.done["prepared"], store(), self.model
        )

    def works(self, stage: str) -> list[Work]:
        return [work for work in self.plan.works if work.stage == stage]

    def sum(self, stage: str, of: str) -> int:
        return sum(getattr(work, of) for work in self.works(stage))

    def again(self, stage: str) -> None:
        """Do the work of a stage, whose results are not in the store."""
        done, config = self.done, self.done["config"]
        prepared, base = done["prepared"], done["base"]
        plain = {key: base[key] for key in ("ref", "value")}
        bare = {"prepared": prepared, "base": base, "banked": None, "fused": None}
        inputs = bare | {"banked": done["bank"], "fused": done["fusion"]}
        few = prepared["value"]["few_shot"]
        if stage == "task adaptation":
            result(task_adapt.task_adapt.fn(config, TASK, prepared, plain))
        elif stage == "embedding":
            result(embedding.embed.fn(config, TASK, prepared, base))
        elif stage == "refit":
            result(refit.refit.fn(config, TASK, prepared, base, done["embedded"]))
        elif stage == "meta-LoRAs":
            anchors = done["anchors"]["value"]["anchors"]
            result(meta_lora.meta_lora.fn(config, TASK, prepared, base, anchors))
        elif stage == "evidence":
            embedded = done["embedded"]
            result(evidence.evidence.fn(config, TASK, prepared, base, embedded, done["bank"]))
        elif stage == "training":
            result(stacking.stacking.fn(config, TASK, inputs, "mta", 0, few))
        elif stage == "scoring":
            for method in METHODS:
                own = done["stacking"]["mta"][0] if method == "mta" else None
                given = bare if method == "base" else inputs
                result(scoring.predict.fn(config, TASK, given, method, 0, few, own))


FOLDERS = {
    "task adaptation": ["task_adapt"],
    "embedding": ["embedding"],
    "refit": ["refit"],
    "meta-LoRAs": ["meta_lora", "bank"],
    "evidence": ["evidence"],
    "fusion": ["fusion"],
    "training": ["stacking"],
    "scoring": ["predictions", "score"],
    "tokens kept": ["tokens"],
}


@pytest.fixture(scope="module", params=WAYS)
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """A model of four layers, large enough that its own numbers are most of what it takes."""
    with prepared_place(tmp_path_factory.mktemp("plan")) as place:
        base = tiny_base(256, hidden_size=128, intermediate_size=384, num_hidden_layers=4)
        base.model.save_pretrained(place / "model")
        yield Case(place, WAYS[request.param])


def without(stage: str, call: Callable[[], Any]) -> Any:
    """`call` with a store that has no results of the stage; they are put back afterwards."""
    folder = store().root / FOLDERS[stage][0]
    kept = folder.with_name(f".{folder.name}")
    folder.rename(kept)
    try:
        return call()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        kept.rename(folder)


def stages(case: Case) -> list[str]:
    return [name for name in FOLDERS if case.works(name)]


def test_users_steps_and_tokens(case: Case) -> None:
    assert case.plan.users == {"base": 2, "anchor": 4, "few_shot": 5}
    anchors = case.done["anchors"]["value"]["anchors"]
    wanted = 1 if case.options.anchors.train_on == "cluster" else 3
    assert case.plan.anchors == len(anchors) == wanted
    records = [json.loads(path.read_text()) for path in store().root.glob("meta_lora/*/*/*.json")]
    for of in ("items", "steps", "tokens"):
        assert case.sum("meta-LoRAs", of) == sum(record["value"][of] for record in records)
    work = case.done["stacking"]["mta"][0]["value"]["work"]
    for of in ("steps", "tokens"):
        assert case.sum("training", of) == sum(user[of] for user in work)
    if adapter := case.done["base"].get("adapter"):
        for of in ("items", "steps", "tokens"):
            assert case.sum("task adaptation", of) == adapter["value"][of]
    assert [work.items for work in case.works("scoring")] == [
        20 * (15 if case.options.scoring.answer == "likelihood" else 1)
    ] * 3


def test_flops_and_memory(case: Case) -> None:
    """FLOPs to a fiftieth: an answer may end before its full length."""
    looked = 0
    for stage in stages(case):
        if not case.sum(stage, "flops"):
            continue
        looked += 1
        case.again(stage)  # found; from here on the model is loaded
        measured = without(stage, lambda stage=stage: flops(lambda: case.again(stage)))
        assert case.sum(stage, "flops") == pytest.approx(measured, rel=0.02), stage
        beside = max(work.memory for work in case.works(stage)) - case.model.weights
        measured = without(stage, lambda stage=stage: peak_bytes(lambda: case.again(stage)))
        assert beside == pytest.approx(measured, rel=0.2), stage
    assert looked >= 4


def test_disk(case: Case) -> None:
    """Each stage that is not next to nothing, and all of them."""
    total = 0
    for stage in stages(case):
        folders = [store().root / name for name in FOLDERS[stage]]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        measured = sum(path.stat().st_size for path in files)
        total += measured
        if measured > 30_000:
            assert case.sum(stage, "disk") == pytest.approx(measured, rel=0.2), stage
    assert sum(work.disk for work in case.plan.works) == pytest.approx(total, rel=0.2)

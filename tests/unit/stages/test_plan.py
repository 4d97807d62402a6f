"""A plan against the run that it is of: users, items, steps, tokens and disk, stage by stage.

The stages run on a small model and a few users, and the store is weighed. Of disk a plan has to be
within a fifth, the rest is exact. tests/unit/lora/test_cost.py holds FLOPs to torch's counter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.lamp_task import lamp_task
from tasks.compare import DRAWS_FILE
from tasks.methods import MethodName
from tasks.plan.cost import Work
from tasks.plan.model import plan_model
from tasks.plan.stages import Planner
from tasks.results.store import store
from tasks.stacking import read_work
from tasks.stand_in import planned_by
from tests.unit.lora.helpers import tiny_base
from tests.unit.stages.pipeline import prepared_place, run_config
from tests.unit.stages.users import user

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
        "anchors": ANCHORS | {"train_on": "cluster", "clustering": "kmeans", "count": 1},
    },
}


# Row of a plan: the folders of the store that it is found in.
FOLDERS = {
    "task adaptation": ["task_adapt"],
    "embedding": ["embed", "whitening"],
    "meta-LoRAs": ["meta_lora", "bank"],
    "evidence": ["evidence"],
    "fusion": ["fusion"],
    "training": ["stacking"],
    "scoring": ["answers", "compare"],
    "tokens kept": ["tokens"],
}


class Case:
    """One run that is done, and the plan of it."""

    def __init__(self, place: Path, given: dict[str, Any]) -> None:
        # More threads would wait for each other.
        compute = {"device": "cpu", "threads": 1}
        self.config = run_config(place, ROLES, methods=METHODS, compute=compute, **dict(given))
        task = self.config.for_task("LaMP-2M", 0)
        self.done = lamp_task(task)
        planner = Planner(plan_model(self.config))
        with planned_by(planner):
            lamp_task(task)
        (self.plan,) = planner.plans
        # The bytes of every stage's files; the bootstrap's draws are as many for any users.
        self.bytes = {
            folder.name: sum(
                path.stat().st_size
                for path in folder.rglob("*")
                if path.is_file() and path.name != DRAWS_FILE
            )
            for folder in store().root.iterdir()
        }

    def works(self, stage: str) -> list[Work]:
        return [work for work in self.plan.rows if work.stage == stage]

    def sum(self, stage: str, of: str) -> int:
        return sum(getattr(work, of) for work in self.works(stage))


@pytest.fixture(scope="module", params=WAYS)
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """A model of four layers, large enough that its own numbers are most of what it takes."""
    with prepared_place(tmp_path_factory.mktemp("plan")) as place:
        base = tiny_base(256, hidden_size=128, intermediate_size=384, num_hidden_layers=4)
        base.model.save_pretrained(place / "model")
        yield Case(place, WAYS[request.param])


def test_users_steps_and_tokens(case: Case) -> None:
    assert case.plan.users == {"base": 2, "anchor": 4, "few_shot": 5}
    bank = case.done.mergings[0].merged.bank
    wanted = 1 if case.config.anchors.train_on == "cluster" else 3
    assert case.sum("meta-LoRAs", "users") == len(bank.members) == wanted
    for of in ("items", "steps", "tokens"):
        trained = [getattr(member.training, of) for member in bank.members]
        assert case.sum("meta-LoRAs", of) == sum(trained)
    (batch,) = case.done.answers["mta"]
    for of in ("steps", "tokens"):
        own = [getattr(work, of) for work in read_work(store().path(batch.work))]
        assert case.sum("training", of) == sum(own)
    if adapted := case.done.base.training:
        for of in ("items", "steps", "tokens"):
            assert case.sum("task adaptation", of) == getattr(adapted, of)
    assert [work.items for work in case.works("scoring")] == [20] * 3


def test_disk(case: Case) -> None:
    """Each stage that is not next to nothing, as files have an overhead; and all of them."""
    total = 0
    for row, folders in FOLDERS.items():
        measured = sum(case.bytes.get(name, 0) for name in folders)
        total += measured
        if measured > 40_000:
            assert case.sum(row, "disk") == pytest.approx(measured, rel=0.2), row
    assert sum(work.disk for work in case.plan.rows) == pytest.approx(total, rel=0.2)

"""The flow of one LaMP task: what stages are given, and what is done where one fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from flows.lamp_task import lamp_task
from flows.mta import one_cell
from tasks.config.run import resolve
from tasks.config.task import TaskConfig
from tasks.errors import DiskFull, InputError
from tasks.methods import METHODS
from tasks.results.models import (
    Anchor,
    Anchors,
    Answers,
    Bank,
    Base,
    Clusters,
    Compared,
    Embedded,
    Evidence,
    MetaLora,
    MetaLoras,
    Recipes,
)
from tasks.results.stage import StageFailed
from tests.unit.stages.answered import prepared
from tests.unit.stages.vectors import NO_FILE, NO_TRAINING

USERS = ("u1", "u2", "u3", "u4", "u5")
BASE = Base(model="none", content="none", dtype="float32", max_tokens=64)
EMBEDDED = Embedded(table=NO_FILE, centred=True, users=5, dimensions=2)
CLUSTERS = Clusters(clusters=(0,) * 10)
EVIDENCE = Evidence(table=NO_FILE)
RECIPES = Recipes(table=NO_FILE, users=5, anchors_per_user=2, without_similar_anchor=0)
CHOSEN = Anchors(
    table=NO_FILE,
    anchors=tuple(
        Anchor(name=name, items=9, cluster=0, members=(name, f"{name}2")) for name in "abcde"
    ),
    whole_clusters=5, asked=5, candidates=10, eligible=10, clusters=5, noise=0,
)  # fmt: skip


class Done:
    """Stands in for a job that ended."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def result(self) -> Any:
        return self.make()


class StandIn:
    """Stands in for a stage; keeps what it is called with."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *given: Any) -> Any:
        return self.submit(*given).result()

    def submit(self, *given: Any) -> Done:
        self.calls.append(given)
        return Done(lambda: self.make(*given))


def trained(_options: Any, anchors: tuple[Anchor, ...], *_: Any) -> MetaLoras:
    return MetaLoras(
        loras=tuple(
            MetaLora(anchor=one.name, members=one.members, adapter=NO_FILE, training=NO_TRAINING)
            for one in anchors
        )
    )


def banked(loras: tuple[MetaLora, ...], *_: Any) -> Bank:
    return Bank(file=NO_FILE, members=loras)


def answered(*given: Any) -> Answers:
    return Answers(users=given[2], predictions=NO_FILE, work=NO_FILE, merged=given[3] is not None)


def compared(_config: Any, _users: Any, answers: dict[str, Any]) -> Compared:
    return Compared(groups=5, queries=5, methods=tuple(answers), intervals={}, differences={})


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, where: Any) -> dict[str, StandIn]:
    """All stages of the flow stood in for, by their names in it."""
    users = prepared("LaMP-2M", dict.fromkeys(USERS, "g"))
    made: dict[str, Callable[..., Any]] = {
        "prepared_users": lambda *_: users,
        "base_model": lambda *_: BASE,
        "coverage_lines": lambda *_: ("a LoRA on 2 of 2 layers",),
        "embedded_users": lambda *_: EMBEDDED,
        "clusters": lambda *_: CLUSTERS,
        "anchors": lambda *_: CHOSEN,
        "meta_lora": trained,
        "bank": banked,
        "fusion": lambda *_: RECIPES,
        "answers": answered,
        "evidence": lambda *_: EVIDENCE,
        "compared": compared,
    }
    found = {name: StandIn(make) for name, make in made.items()}
    module = dict.fromkeys(("clusters", "anchors"), "tasks.anchors")
    module |= dict.fromkeys(("fusion", "evidence"), "tasks.fusion")
    for name, stage in found.items():
        monkeypatch.setattr(f"{module.get(name, 'flows.lamp_task')}.{name}", stage)
    return found


def config_of(*methods: str, **given: Any) -> TaskConfig:
    settings = {
        "methods": list(methods),
        "anchors": {"per_job": 2},
        "fusion": {"weights": "cosine"},
        "stacking": {"users_per_job": 2},
    }
    return resolve(settings | given).for_task("LaMP-2M", 0)


def names(batches: tuple[Answers, ...]) -> list[tuple[str, ...]]:
    return [one.users for one in batches]


def test_methods_alike_share_a_bank(stages: dict[str, StandIn]) -> None:
    """mta_published embeds texts and clusters by k-means; base and oppu merge nothing."""
    cell = lamp_task(config_of("base", "oppu", "merge_only", "mta", "mta_published"))
    assert [one.methods for one in cell.mergings] == [("merge_only", "mta"), ("mta_published",)]
    assert cell.merging("mta") == cell.merging("merge_only") != cell.merging("mta_published")
    assert cell.merging("base") is None
    options = [given[0] for given in stages["anchors"].calls]
    assert [(one.embedding, one.clustering) for one in options] == [
        ("input_signature", "silhouette"), ("text", "kmeans")
    ]  # fmt: skip
    merged = {given[0].method: given[3] for given in stages["answers"].calls}
    assert {name: one and one.how for name, one in merged.items()} == {
        "base": None, "oppu": None, "merge_only": "exact", "mta": "exact",
        "mta_published": "factors",
    }  # fmt: skip
    trains = {given[0].method: given[0].training is not None for given in stages["answers"].calls}
    assert [name for name, one in trains.items() if one] == ["oppu", "mta", "mta_published"]
    assert cell.missing == ()
    assert cell.coverage == ("a LoRA on 2 of 2 layers",)


def test_every_stage_gets_what_the_one_before_gave(stages: dict[str, StandIn]) -> None:
    cell = lamp_task(config_of("mta", fusion={"weights": "evidence"}))
    (anchors,) = stages["anchors"].calls
    assert anchors[1:4] == (EMBEDDED, cell.users.anchor, CLUSTERS)
    bank = banked(tuple(one for part in ("ab", "cd", "e") for one in loras_of(part)))
    (fused,) = stages["fusion"].calls
    assert fused[1:4] == (EMBEDDED, bank, EVIDENCE)
    (weighed,) = stages["evidence"].calls
    assert weighed[1:4] == (EMBEDDED, bank, cell.users.few_shot)
    assert weighed[4].base == BASE
    (merging,) = cell.mergings
    assert (merging.embedded, merging.chosen) == (EMBEDDED, CHOSEN)
    assert (merging.merged.bank, merging.merged.recipes) == (bank, RECIPES)
    lamp_task(config_of("mta"))
    assert stages["fusion"].calls[1][3] is None


def loras_of(anchors: str) -> tuple[MetaLora, ...]:
    return trained(None, tuple(one for one in CHOSEN.anchors if one.name in anchors)).loras


def test_failing_anchors_are_named(stages: dict[str, StandIn]) -> None:
    """Five anchors in jobs of two: b failed in its job, the job of c and d failed as a whole."""

    def some(options: Any, anchors: tuple[Anchor, ...], *_: Any) -> MetaLoras:
        if anchors[0].name == "c":
            raise StageFailed("meta_lora: out of memory")
        if anchors[0].name == "a":
            return MetaLoras(loras=loras_of("a"), failed=("anchor b: not finite",))
        return trained(options, anchors)

    stages["meta_lora"].make = some
    cell = lamp_task(config_of("merge_only", "mta"))
    jobs = [[one.name for one in given[1]] for given in stages["meta_lora"].calls]
    assert jobs == [["a", "b"], ["c", "d"], ["e"]]
    (merging,) = cell.mergings
    assert merging.merged.bank.names == ["a", "e"]
    assert merging.merged.bank.members[0].members == ("a", "a2")
    assert cell.missing == (
        "LaMP-2M: anchor c d: meta_lora: out of memory",
        "LaMP-2M: anchor b: not finite",
    )


def no_memory(*_: Any) -> Any:
    raise StageFailed("no memory")


def test_a_method_without_any_anchor_is_named_and_others_go_on(
    stages: dict[str, StandIn],
) -> None:
    stages["meta_lora"].make = no_memory
    cell = lamp_task(config_of("base", "merge_only", "mta"))
    assert list(cell.answers) == ["base"]
    assert cell.mergings == ()
    assert cell.missing[:3] == tuple(
        f"LaMP-2M: anchor {one}: no memory" for one in ("a b", "c d", "e")
    )
    assert cell.missing[3:] == (
        "LaMP-2M: merge_only, mta: no anchor could be trained; anchor a b: no memory",
    )
    with pytest.raises(StageFailed, match="anchor a b: no memory"):
        lamp_task(config_of("merge_only", "mta"))


@pytest.mark.parametrize("stage", ["embedded_users", "anchors", "bank", "fusion"])
def test_without_a_bank_or_recipes_a_method_is_named(
    stages: dict[str, StandIn], stage: str
) -> None:
    stages[stage].make = no_memory
    cell = lamp_task(config_of("base", "mta"))
    assert list(cell.answers) == ["base"]
    assert cell.missing == ("LaMP-2M: mta: no memory",)


def test_bad_input_of_one_bank_leaves_the_other_methods(stages: dict[str, StandIn]) -> None:
    """mta_published embeds texts, by an encoder that is not there: no stage says so, the flow."""

    def embedded(config: Any, *_: Any) -> Embedded:
        if config.anchors.embedding == "text":
            raise InputError("anchors.text_model: cannot be loaded")
        return EMBEDDED

    stages["embedded_users"].make = embedded
    cell = lamp_task(config_of("base", "mta", "mta_published"))
    assert list(cell.answers) == ["base", "mta"]
    assert cell.missing == ("LaMP-2M: mta_published: anchors.text_model: cannot be loaded",)


def test_a_method_that_cannot_be_fitted_is_named_and_others_go_on(
    stages: dict[str, StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "per_pcs", replace(METHODS["per_pcs"], fit=no_memory))
    cell = lamp_task(config_of("base", "mta", "per_pcs"))
    assert list(cell.answers) == ["base", "mta"]
    assert names(cell.answers["mta"]) == [("u1", "u2"), ("u3", "u4"), ("u5",)]
    assert cell.missing == ("LaMP-2M: per_pcs: no memory",)
    with pytest.raises(StageFailed, match="no batch of users could be scored; per_pcs: no memory"):
        lamp_task(config_of("per_pcs"))


def test_bad_input_of_one_task_is_a_line_of_the_run(stages: dict[str, StandIn]) -> None:
    """And the other LaMP tasks go on; so does the task where a point of its curve is bad."""

    def users(config: TaskConfig) -> Any:
        if config.lamp_task == "LaMP-3" or config.split.few_shot_items == 2:
            raise InputError("data: no users")
        return prepared("LaMP-2M", dict.fromkeys(USERS, "g"))

    stages["prepared_users"].make = users
    config = resolve({"methods": ["base"], "items_curve": [2, 5]})
    assert one_cell(config, 0, "LaMP-3") == (None, ["LaMP-3: data: no users"])
    cell, missing = one_cell(config, 0, "LaMP-2M")
    assert cell
    assert list(cell.curve) == [5]
    assert missing == ["LaMP-2M with 2 items: data: no users"]


@pytest.mark.parametrize("stage", ["prepared_users", "base_model", "compared"])
def test_what_all_need_ends_the_task(stages: dict[str, StandIn], stage: str) -> None:
    stages[stage].make = no_memory
    with pytest.raises(StageFailed, match="no memory"):
        lamp_task(config_of("base", "mta"))


def lost(how: Any, *given: Any) -> Answers:
    if (how.method, given[1]) == ("mta", ("u3", "u4")):
        raise StageFailed("answers: killed")
    return answered(how, *given)


def test_a_batch_that_one_method_lacks_is_left_out_of_all(stages: dict[str, StandIn]) -> None:
    """Otherwise the methods would be compared on other users."""
    stages["answers"].make = lost
    cell = lamp_task(config_of("base", "mta"))
    wanted = [("u1", "u2"), ("u5",)]
    assert {name: names(own) for name, own in cell.answers.items()} == {
        "base": wanted, "mta": wanted
    }  # fmt: skip
    assert cell.missing == ("LaMP-2M: answers of mta 1: answers: killed",)
    (compare,) = stages["compared"].calls
    assert {name: names(own) for name, own in compare[2].items()} == {
        "base": wanted, "mta": wanted
    }  # fmt: skip


def test_without_any_batch_the_task_ends(stages: dict[str, StandIn]) -> None:
    stages["answers"].make = no_memory
    with pytest.raises(StageFailed, match="no batch of users could be scored; answers of base 0"):
        lamp_task(config_of("base"))


def test_users_whose_training_failed_are_named(stages: dict[str, StandIn]) -> None:
    line = "training of user u5: the loss stopped being finite at step 3"

    def some(*given: Any) -> Answers:
        failed = (line,) if "u5" in given[2] else ()
        return answered(*given).model_copy(update={"failed": failed})

    stages["answers"].make = some
    cell = lamp_task(config_of("oppu"))
    assert cell.missing == (f"LaMP-2M: oppu, {line}",)
    assert names(cell.answers["oppu"]) == [("u1", "u2"), ("u3", "u4"), ("u5",)]


@pytest.mark.parametrize("stage", ["meta_lora", "answers"])
def test_a_full_disk_ends_the_task_at_once(stages: dict[str, StandIn], stage: str) -> None:
    def full(*_: Any) -> Any:
        raise DiskFull("no space left")

    stages[stage].make = full
    with pytest.raises(DiskFull, match="no space left"):
        lamp_task(config_of("base", "mta"))


def test_a_point_of_the_curve_takes_base_and_bank(stages: dict[str, StandIn]) -> None:
    """Only few-shot users' items differ: anchors stay; recipes are made anew, and most answers."""
    config = config_of("base", "rag", "merge_only", "mta")
    cell = lamp_task(config)
    for stage in stages.values():
        stage.calls.clear()
    stages["fusion"].make = lambda *_: RECIPES.model_copy(update={"anchors_per_user": 1})
    point = lamp_task(config, known=cell)
    for name in ("base_model", "clusters", "anchors", "meta_lora", "bank"):
        assert stages[name].calls == []
    assert (len(stages["embedded_users"].calls), len(stages["fusion"].calls)) == (1, 1)
    (before,), (after,) = cell.mergings, point.mergings
    assert (after.chosen, after.merged.bank) == (before.chosen, before.merged.bank)
    assert after.merged.recipes.anchors_per_user == 1
    asked = [given[0].method for given in stages["answers"].calls]
    assert asked == ["rag"] * 3 + ["merge_only"] * 3 + ["mta"] * 3
    assert point.answers["base"] == cell.answers["base"]


def test_the_curve_has_the_batches_that_the_task_lacked(stages: dict[str, StandIn]) -> None:
    config = config_of("base", "mta")
    stages["answers"].make = lost
    cell = lamp_task(config)
    stages["answers"].make = answered
    stages["answers"].calls.clear()
    point = lamp_task(config, known=cell)
    batches = [("u1", "u2"), ("u3", "u4"), ("u5",)]
    assert {name: names(own) for name, own in point.answers.items()} == {
        "base": batches, "mta": batches
    }  # fmt: skip
    asked = [given[2] for given in stages["answers"].calls if given[0].method == "base"]
    assert asked == [("u3", "u4")]

"""What a plan assumes, and how it is told."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import huggingface_hub
import pytest

from flows.lamp_task import lamp_task
from tasks.anchors import anchors, clusters
from tasks.answer import answers
from tasks.bank import bank, meta_lora, own_bank
from tasks.base_model import given_model, task_adapt, tiny_model
from tasks.config.run import RunConfig, resolve
from tasks.config.task import MethodConfig
from tasks.embed import embed
from tasks.errors import InputError
from tasks.fusion import evidence, fusion, learned_weights
from tasks.lora.batches import Encoded
from tasks.method.clusters import members_of
from tasks.methods import METHODS
from tasks.plan.cost import Counts, Measure, TaskPlan, Work, assumed_clusters
from tasks.plan.model import CHARACTERS_PER_TOKEN, Characters, plan_model
from tasks.plan.run import hours, plan_text
from tasks.plan.stages import Planner
from tasks.prepare import prepared_users
from tasks.record import File
from tasks.results.models import Base, Prepared, Setting
from tasks.results.stage import Stage, stage
from tasks.stand_in import planned_by
from tasks.text.questions import questions_of
from tasks.users import users_of
from tests.unit.lora.helpers import tiny_base
from tests.unit.stages.users import user, write_users

ROLES = {
    "base": [user("base-1", 3)],
    "anchor": [user(f"anchor-{n}", 11 + n) for n in range(6)],
    "few_shot": [user(f"few-{n}", 4, queries=2) for n in range(3)],
}


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub answers; a store of the test's own."""

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "mta" / "store"))


def config_at(tmp_path: Path, **given: Any) -> RunConfig:
    return resolve({"data": str(write_users(tmp_path / "data", **ROLES)), **given})


def notes_of(config: RunConfig) -> list[str]:
    """What a plan of LaMP-2M says beneath its table."""
    (plan,) = plans_of(config)
    return plan.notes


def plans_of(config: RunConfig, items: int | None = None) -> list[TaskPlan]:
    """The plan of LaMP-2M, and of a point of the curve if `items` says which."""
    planner = Planner(plan_model(config))
    with planned_by(planner):
        cell = lamp_task(config.for_task("LaMP-2M", 0))
        if items:
            lamp_task(config.for_task("LaMP-2M", 0, items), known=cell)
    return planner.plans


def test_the_papers_model_is_known_without_the_hub() -> None:
    """8,030,261,248 parameters, as its weights have; a LoRA of rank 8 on all linear layers has
    20,971,520: 32 x 8 x (2 x 8192 + 2 x 5120 + 3 x 18432)."""
    model = plan_model(resolve({"preset": "paper"}))
    assert model.parameters == 8_030_261_248
    assert model.weights == 2 * 8_030_261_248
    assert model.base.max_tokens == 8192 - 64
    assert model.lora(resolve({"preset": "paper"}).meta_lora).width == 20_971_520
    assert isinstance(model.base.tokenizer, Characters)
    assert "not at hand" in model.notes[0]
    assert "characters / 4" in model.notes[1]


def test_a_model_nobody_knows_is_one_line() -> None:
    with pytest.raises(InputError, match=r"base\.model nobody/nothing: neither a folder nor"):
        plan_model(resolve({"base": {"model": "nobody/nothing"}}))
    with pytest.raises(InputError, match="there is no such folder"):
        plan_model(resolve({"base": {"model": "/no/such/folder"}}))


def test_a_folder_needs_no_weights(tmp_path: Path) -> None:
    base = tiny_base()
    base.model.config.save_pretrained(tmp_path / "model")
    options = resolve({"base": {"model": str(tmp_path / "model")}})
    bare = plan_model(options)
    assert bare.parameters == base.model.num_parameters()
    assert len(bare.notes) == 1
    base.tokenizer.save_pretrained(tmp_path / "model")
    whole = plan_model(options)
    assert whole.notes == []
    assert whole.base.tokenizer("comedy") == base.tokenizer("comedy")


def test_bytes_per_number() -> None:
    """As `base.dtype` and `compute.device` would have it; `auto` is bfloat16 on a GPU."""
    for given, each in (
        ({}, 2),
        ({"compute": {"device": "cpu"}}, 4),
        ({"compute": {"device": "cpu"}, "base": {"dtype": "bfloat16"}}, 2),
        ({"base": {"dtype": "float32"}}, 4),
    ):
        assert plan_model(resolve(given)).each == each


def test_an_encoder_that_is_not_counted_is_said(tmp_path: Path) -> None:
    anchors = {"embedding": "text", "text_model": "some/encoder", "train_on": "user"}
    notes = notes_of(config_at(tmp_path, methods=["merge_only"], anchors=anchors))
    assert any("some/encoder" in note and "not counted" in note for note in notes)


class Told(Measure):
    """Lengths of users who are told to it."""

    people: list[dict[str, Any]]

    def users(self, table: File) -> dict[str, Counts]:
        return {
            one["user_id"]: Counts(len(one["profile"]), len(one.get("query", ())), 0)
            for one in self.people
        }

    def records(self, table: File, places: Collection[int]) -> list[dict[str, Any]]:
        return [self.people[place] for place in places]


def lengths_of(
    config: RunConfig, kind: Any, people: list[dict[str, Any]]
) -> tuple[list[list[Encoded]], list[str]]:
    """The lengths of these users' samples, and notes."""
    task = config.for_task("LaMP-2M", 0)
    questions = questions_of(task.prompt, prepared_users(task), task.base.model)
    measure = Told(plan_model(config))
    measure.people = people
    return measure.tokens(kind, questions, File(uri="none", sha256="")), measure.notes


def test_without_a_tokenizer_tokens_are_characters(tmp_path: Path) -> None:
    person = {
        "user_id": "u",
        "profile": [{"id": "1", "text": "x" * 400, "answer": "comedy"}],
        "query": [{"id": "q", "input": "a description: " + "y" * 40, "gold": "comedy"}],
    }
    # No history in the prompt: the item has none beside itself.
    config = config_at(tmp_path, preset="paper", prompt={"history_items": 0})
    ((item,),), notes = lengths_of(config, "profile", [person])
    ((query,),), _ = lengths_of(config, "queries", [person])
    assert notes == []
    assert 400 / CHARACTERS_PER_TOKEN < len(item.prompt) < 400 / CHARACTERS_PER_TOKEN + 60
    # " comedy" is two tokens of four characters, and the end of the text.
    assert (len(item.answer), len(query.answer)) == (3, 0)
    assert len(item.prompt) - len(query.prompt) == 90


def test_many_items_are_looked_at_in_part(tmp_path: Path) -> None:
    """Every third user; the others' items are as long as theirs."""
    people = [
        {
            "user_id": f"{n}",
            "profile": [
                {"id": f"{n}{i}", "text": "x" * 40 * (n + 1), "answer": "a"} for i in range(2)
            ],
        }
        for n in range(9)
    ]
    config = config_at(tmp_path, preset="paper", prompt={"history_items": 0}, plan={"max_items": 6})
    found, notes = lengths_of(config, "profile", people)
    assert [len(own) for own in found] == [2] * 9
    lengths = [{len(one.prompt) for one in own} for own in found]
    first, fourth, seventh = (next(iter(lengths[n])) for n in (0, 3, 6))
    assert (fourth - first, seventh - fourth) == (30, 30)
    assert all(own <= {first, fourth, seventh} for own in lengths)
    assert "6 of 18 profile items of 9 users" in notes[0]


def test_many_queries_are_looked_at_in_part(tmp_path: Path) -> None:
    """Where labels are compared a query has a sample for each of the 15, in any user's turn."""
    people = [
        {
            "user_id": f"{n}",
            "profile": [],
            "query": [
                {"id": f"{n}{i}", "input": "x" * 40 * n, "gold": ""} for i in range(1 + n % 2)
            ],
        }
        for n in range(8)
    ]
    config = config_at(tmp_path, preset="paper", prompt={"history_items": 0}, plan={"max_items": 4})
    found, notes = lengths_of(config, "choices", people)
    assert [len(own) for own in found] == [15, 30] * 4
    assert "4 of 12 queries of 8 users" in notes[0]
    # Every query has all labels, whose lengths stand in their order.
    wanted = [len(one.answer) for one in found[0]]
    assert all([len(one.answer) for one in own[:15]] == wanted for own in found)


def test_a_table_is_counted_without_its_texts(tmp_path: Path) -> None:
    config = config_at(tmp_path)
    users = prepared_users(config.for_task("LaMP-2M", 0))
    read = users_of(users.few_shot)
    assert Measure(plan_model(config)).users(users.few_shot) == {
        one["user_id"]: (
            len(one["profile"]), len(one["query"]), sum(len(q["gold"]) for q in one["query"])
        )
        for one in read
    }  # fmt: skip


def members(options: dict[str, Any], items: dict[str, int]) -> dict[str, list[str]]:
    """Whom the plan takes for anchors, with their members."""
    anchors = resolve({"anchors": options}).anchors
    labels = assumed_clusters(anchors, len(items), 0)
    assert assumed_clusters(anchors, len(items), 0) == labels
    return members_of([*items], [*items.values()], labels, anchors)


def test_anchors_where_all_are_taken() -> None:
    items = {"a": 12, "b": 11, "c": 10, "d": 30}
    anchors = members({"count": 9, "train_on": "user"}, items)
    assert sorted(anchors.values()) == [["a"], ["b"], ["d"]]
    # k-means makes clusters of all candidates, and a cluster of a short history has no anchor.
    means = {"count": 4, "clustering": "kmeans", "train_on": "user"}
    assert sorted(members(means, items)) == ["a", "b", "d"]


def test_anchors_are_the_longest_of_parts() -> None:
    items = {f"u{n}": 11 + n for n in range(40)}
    anchors = members({"count": 4, "train_on": "user"}, items)
    assert len(anchors) == 4
    assert "u39" in anchors
    # Of ten each, the longest is above the middle.
    assert all(items[name] > 11 + 20 for name in anchors)


def test_clusters_hold_all_candidates() -> None:
    items = {f"u{n}": 5 + n for n in range(50)}
    clusters = members({"train_on": "cluster"}, items)
    assert len(clusters) == 5
    assert sorted(name for own in clusters.values() for name in own) == sorted(items)
    both = members({"train_on": "both", "count": 7}, items)
    assert [len(own) for own in both.values()] == [10] * 5 + [1] * 7


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    given: dict[str, Any] = {"preset": "paper", "methods": ["base", "mta"]}
    notes = notes_of(config_at(tmp_path, **given, plan={"memory_gb": 17.0}))
    assert any("more than the machine has" in note for note in notes)
    notes = notes_of(config_at(tmp_path, **given))
    assert not any("more than the machine has" in note for note in notes)


def test_fewer_items_again_cost_only_what_depends_on_them(tmp_path: Path) -> None:
    whole, again = plans_of(config_at(tmp_path), items=2)
    assert {work.stage for work in again.rows} == {
        "embedding", "evidence", "fusion", "training", "scoring", "tokens kept",
    }  # fmt: skip
    assert "base" in {work.method for work in whole.rows if work.stage == "scoring"}
    assert "base" not in {work.method for work in again.rows if work.stage == "scoring"}
    embedded = [
        next(work for work in plan.rows if work.stage == "embedding") for plan in (whole, again)
    ]
    assert [work.users for work in embedded] == [1 + 6 + 3, 3]


def test_the_papers_plan_by_hand(tmp_path: Path) -> None:
    """Six anchors of 11 to 16 items, three epochs of one item per micro-batch and two of these per
    step; three users of four items, one step each, and two questions of 8 new tokens each."""
    config = config_at(tmp_path, preset="paper", methods=["mta"])
    (plan,) = plans_of(config)
    by_stage = {work.stage: work for work in plan.rows}
    meta = by_stage["meta-LoRAs"]
    assert (meta.users, meta.items) == (6, 81)
    assert meta.steps == 3 * (6 + 6 + 7 + 7 + 8 + 8)
    own = by_stage["training"]
    assert (own.users, own.items, own.steps) == (3, 12, 3)
    assert own.disk == pytest.approx(3 * 4 * 20_971_520 / 2, rel=1e-4)
    numbers = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    # Forward, forward again and the gradient of x: three times two FLOPs per number and token. The
    # rest is the users' LoRAs, attention over some 100 tokens, and the head for the answers.
    assert 6 * numbers * own.tokens < own.flops < 1.05 * 6 * numbers * own.tokens
    # The bank of anchors' LoRAs, each user's merged from them, and the user's own with its
    # gradient and AdamW's two moments.
    own_size, anchor_size = 20_971_520 // 2, 20_971_520
    loras = 6 * anchor_size + 3 * anchor_size + 3 * 4 * own_size
    assert own.memory == 2 * 8_030_261_248 + 4 * loras
    # 989 TFLOP/s, a quarter of them; each new token reads 16 GB of weights at 3.35 TB/s.
    assert own.seconds == pytest.approx(own.flops / 247.25e12)
    asked = by_stage["scoring"]
    assert (asked.users, asked.items, asked.steps) == (3, 6, 0)
    assert 2 * numbers * asked.tokens < asked.flops < 1.05 * 2 * numbers * asked.tokens
    reading = 8 * 2 * 8_030_261_248 / 3.35e12
    assert asked.seconds == pytest.approx(asked.flops / 247.25e12 + reading)
    text = plan_text(config, plan_model(config), [plan])
    assert "| meta-LoRAs | mta | 6 | 81 | 126 |" in text
    assert "8.03 G parameters, 16.1 GB in bfloat16" in text
    assert "989 TFLOP/s at 25% of them (assumed)" in text
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows} == {10}


def test_the_tiny_models_own_training(tmp_path: Path) -> None:
    """Six FLOPs per parameter and token (Kaplan et al. 2020, section 2.1); as much memory as four
    times the weights: weights, gradients, and AdamW's two moments."""
    config = config_at(tmp_path, methods=["base"], compute={"device": "cpu"})
    model, (plan,) = plan_model(config), plans_of(config)
    (work,) = (work for work in plan.works if work.stage == "base model")
    assert (work.items, work.steps) == (3, config.base.tiny.steps)
    assert work.flops == 6 * model.parameters * work.tokens
    assert work.memory == 4 * 4 * model.parameters


def test_what_is_assumed_of_the_model_is_said_once(tmp_path: Path) -> None:
    config = config_at(tmp_path, preset="paper", methods=["mta"])
    model, plans = plan_model(config), plans_of(config, items=2)
    assert not any(note in plan.notes for plan in plans for note in model.notes)
    assert model.notes
    plans[1].notes.append("of this one only")
    text = plan_text(config, model, plans)
    own, everything = text.split("## All of 2")
    for note in model.notes:
        assert (own.count(note), everything.count(f"* {note}\n")) == (0, 1)
    assert "* of this one only\n" in own
    assert "of this one only" not in everything
    assert "\n\n\n" not in text


STAGES: list[Stage[..., Any]] = [
    given_model, tiny_model, task_adapt, embed, clusters, anchors, meta_lora, bank, own_bank,
    evidence, fusion, learned_weights, answers,
]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES, ids=lambda one: one.name)
def test_the_planner_takes_what_stages_take(stage: Stage[..., Any]) -> None:
    """By the same names and of the same types: the flow's calls reach it as they are."""
    own, given = get_type_hints(getattr(Planner, stage.name)), get_type_hints(stage.function)
    assert own.pop("_", object) is object
    assert {name: given[name] for name in own} == own


@stage(version=1)
def routed(users: File, base: Base) -> Base:
    """A stage that no plan knows of."""
    raise AssertionError("the stage was run")


def test_a_stage_of_a_methods_own_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(_config: MethodConfig, users: Prepared, setting: Setting, merged: None) -> Any:
        return routed(users.base, setting.base)

    monkeypatch.setitem(METHODS, "base", replace(METHODS["base"], fit=fit))
    notes = notes_of(config_at(tmp_path, methods=["base"]))
    assert "routed: its work is not known and not counted" in notes


def test_what_answers_without_the_model_costs_nothing(tmp_path: Path) -> None:
    (plan,) = plans_of(config_at(tmp_path, methods=["base", "commonest"]))
    of = {work.method: work for work in plan.works if work.stage == "scoring"}
    assert of["base"].flops > of["commonest"].flops == of["commonest"].seconds == 0
    assert of["commonest"].users == of["base"].users > 0


def test_users_are_prepared_and_nothing_else(tmp_path: Path) -> None:
    plans_of(config_at(tmp_path))
    kept = {path.name for path in (tmp_path / "mta" / "store").iterdir()}
    assert kept - {".making"} == {"prepare"}


def test_hours_are_short() -> None:
    assert [hours(s) for s in (0.0, 35.9, 36.0, 4500.0)] == ["0", "< 0.01", "0.01", "1.25"]


def test_a_cell_of_nothing_is_empty(tmp_path: Path) -> None:
    config = resolve({})
    plan = TaskPlan("LaMP-2M", {"base": 1}, [Work("fusion", "mta", users=1, disk=999)], [])
    assert "| fusion | mta | 1 |  |  |  |  |  |  | 999 B |" in plan_text(
        config, plan_model(config), [plan]
    )

"""What a plan assumes, and how it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from tasks.config import RunConfig, resolve
from tasks.errors import InputError
from tasks.plan.anchors import assumed_anchors
from tasks.plan.lengths import CHARACTERS_PER_TOKEN, Measure
from tasks.plan.model import encoder_size, planned
from tasks.plan.stages import plan_task
from tasks.plan.text import hours, plan_text, short, size
from tasks.prepare import prepare
from tasks.store.artifacts import Store
from tests.unit.lora.helpers import tiny_base
from tests.unit.stages.users import result, user, write_users

LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"
ROLES = {
    "base": [user("base-1", 3)],
    "anchor": [user(f"anchor-{n}", 11 + n) for n in range(6)],
    "few_shot": [user(f"few-{n}", 4, queries=2) for n in range(3)],
}


@pytest.fixture(autouse=True)
def offline(where: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub answers; a store of the test's own."""

    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def users_at(tmp_path: Path, **given: Any) -> tuple[RunConfig, dict[str, Any]]:
    options = resolve({"data": str(write_users(tmp_path / "data", **ROLES)), **given})
    return options, result(prepare.fn(options.model_dump(mode="json"), "LaMP-2M"))


def test_the_papers_model_is_known_without_the_hub() -> None:
    """8,030,261,248 parameters, as its weights have; a LoRA of rank 8 on all linear layers has
    20,971,520: 32 x 8 x (2 x 8192 + 2 x 5120 + 3 x 18432)."""
    model = planned(resolve({"preset": "paper"}))
    assert model.shape.parameters == 8_030_261_248
    assert model.weights == 2 * 8_030_261_248
    assert model.max_tokens == 8192 - 64
    assert model.lora(resolve({"preset": "paper"}).meta_lora).width == 20_971_520
    assert model.base is None
    assert "not at hand" in model.notes[0]


def test_a_model_nobody_knows_is_one_line() -> None:
    with pytest.raises(InputError, match=r"base\.model nobody/nothing: neither a folder nor"):
        planned(resolve({"base": {"model": "nobody/nothing"}}))
    with pytest.raises(InputError, match="there is no such folder"):
        planned(resolve({"base": {"model": "/no/such/folder"}}))


def test_a_folder_needs_no_weights(tmp_path: Path) -> None:
    base = tiny_base()
    base.model.config.save_pretrained(tmp_path / "model")
    options = resolve({"base": {"model": str(tmp_path / "model")}})
    shape = planned(options)
    assert shape.shape.parameters == base.model.num_parameters()
    assert (shape.base, len(shape.notes)) == (None, 1)
    base.tokenizer.save_pretrained(tmp_path / "model")
    whole = planned(options)
    assert whole.notes == []
    assert whole.base is not None


def test_bytes_per_number() -> None:
    """As `base.dtype` and `compute.device` would have it; `auto` is bfloat16 on a GPU."""
    for given, each in (
        ({}, 2),
        ({"compute": {"device": "cpu"}}, 4),
        ({"compute": {"device": "cpu"}, "base": {"dtype": "bfloat16"}}, 2),
        ({"base": {"dtype": "float32"}}, 4),
    ):
        assert planned(resolve(given)).each == each


def test_text_encoders() -> None:
    """bge-small: 12 layers of 4 x 384 x 384 and 2 x 384 x 1536 numbers."""
    notes: list[str] = []
    options = resolve({"anchors": {"text_model": "BAAI/bge-small-en-v1.5"}})
    assert encoder_size(options, notes) == 21_233_664
    assert notes == []
    other = resolve({"anchors": {"text_model": "some/encoder"}})
    assert encoder_size(other, notes) == 0
    assert "its work is not counted" in notes[0]


def test_without_a_tokenizer_tokens_are_characters(tmp_path: Path) -> None:
    options, prepared = users_at(tmp_path, preset="paper")
    model = planned(options)
    measure = Measure(options, "LaMP-2M", prepared["value"]["instruction"], model)
    person = {
        "user_id": "u",
        "profile": [{"id": "1", "text": "x" * 400, "answer": "comedy"}],
        "query": [{"id": "q", "input": "a description: " + "y" * 40, "gold": "comedy"}],
    }
    ((item,),) = measure.profiles([person], 0)
    ((query,),) = measure.queries([person], 0)
    assert 400 / CHARACTERS_PER_TOKEN < len(item.prompt) < 400 / CHARACTERS_PER_TOKEN + 60
    # "comedy" is two tokens of four characters, and the end of the text.
    assert (len(item.answer), len(query.answer)) == (3, 0)
    assert len(item.prompt) - len(query.prompt) == 90
    assert "characters / 4" in next(iter(measure.notes))


def test_many_items_are_looked_at_in_part(tmp_path: Path) -> None:
    """Every third user; the others' items are as long as theirs."""
    options, prepared = users_at(tmp_path, preset="paper")
    options = options.model_copy(update={"plan": options.plan.model_copy(update={"max_items": 6})})
    measure = Measure(options, "LaMP-2M", prepared["value"]["instruction"], planned(options))
    people = [
        {
            "user_id": f"{n}",
            "profile": [
                {"id": f"{n}{i}", "text": "x" * 40 * (n + 1), "answer": "a"} for i in range(2)
            ],
        }
        for n in range(9)
    ]
    found = measure.profiles(people, 0)
    assert [len(own) for own in found] == [2] * 9
    lengths = [{len(one.prompt) for one in own} for own in found]
    first, fourth, seventh = (next(iter(lengths[n])) for n in (0, 3, 6))
    assert (fourth - first, seventh - fourth) == (30, 30)
    assert all(own <= {first, fourth, seventh} for own in lengths)
    assert "6 of 18 profile items of 9 users" in list(measure.notes)[1]


def test_anchors_where_all_are_taken() -> None:
    items = {"a": 12, "b": 11, "c": 10, "d": 30}
    options = resolve({"anchors": {"count": 9, "train_on": "user"}})
    anchors, note = assumed_anchors(options, items)
    assert sorted(anchors) == [["a"], ["b"], ["d"]]
    assert note.startswith("3 anchors")
    # k-means makes clusters of all candidates, and a cluster of a short history has no anchor.
    means = resolve({"anchors": {"count": 4, "clustering": "kmeans", "train_on": "user"}})
    assert sorted(assumed_anchors(means, items)[0]) == [["a"], ["b"], ["d"]]


def test_anchors_are_the_longest_of_parts() -> None:
    items = {f"u{n}": 11 + n for n in range(40)}
    options = resolve({"anchors": {"count": 4, "train_on": "user"}})
    anchors, _ = assumed_anchors(options, items)
    assert len({name for (name,) in anchors}) == 4
    assert ["u39"] in anchors
    # Of ten each, the longest is above the middle.
    assert all(items[name] > 11 + 20 for (name,) in anchors)
    assert assumed_anchors(options, items) == assumed_anchors(options, items)


def test_clusters_hold_all_candidates() -> None:
    items = {f"u{n}": 5 + n for n in range(50)}
    clusters, _ = assumed_anchors(resolve({"anchors": {"train_on": "cluster"}}), items)
    assert len(clusters) == 5
    assert sorted(name for own in clusters for name in own) == sorted(items)
    both, _ = assumed_anchors(resolve({"anchors": {"train_on": "both", "count": 7}}), items)
    assert [len(own) for own in both] == [10] * 5 + [1] * 7


def test_what_does_not_fit_is_said(where: Store, tmp_path: Path) -> None:
    methods = {"methods": ["base", "mta"]}
    options, prepared = users_at(tmp_path, preset="paper", plan={"memory_gb": 17.0}, **methods)
    plan = plan_task(options, "LaMP-2M", prepared, where, planned(options))
    assert any("more than the machine has" in note for note in plan.notes)
    options, prepared = users_at(tmp_path, preset="paper", **methods)
    plan = plan_task(options, "LaMP-2M", prepared, where, planned(options))
    assert not any("more than the machine has" in note for note in plan.notes)


def test_fewer_items_again_cost_only_what_depends_on_them(where: Store, tmp_path: Path) -> None:
    options, prepared = users_at(tmp_path)
    model = planned(options)
    whole = plan_task(options, "LaMP-2M", prepared, where, model)
    again = plan_task(options, "LaMP-2M", prepared, where, model, items=2)
    assert {work.stage for work in again.works} == {
        "embedding", "evidence", "fusion", "training", "scoring", "tokens kept",
    }  # fmt: skip
    assert "base" in {work.method for work in whole.works if work.stage == "scoring"}
    assert "base" not in {work.method for work in again.works if work.stage == "scoring"}
    embedded = [
        next(work for work in plan.works if work.stage == "embedding") for plan in (whole, again)
    ]
    assert [work.users for work in embedded] == [1 + 6 + 3, 3]


def test_the_papers_plan_by_hand(where: Store, tmp_path: Path) -> None:
    """Six anchors of 11 to 16 items, three epochs of one item per micro-batch and two of these per
    step; three users of four items, one step each; 45 FLOPs and more per numbers and token."""
    options, prepared = users_at(tmp_path, preset="paper", methods=["mta"])
    model = planned(options)
    plan = plan_task(options, "LaMP-2M", prepared, where, model)
    by_stage = {work.stage: work for work in plan.works}
    meta = by_stage["meta-LoRAs"]
    assert (meta.users, meta.items) == (6, 81)
    assert meta.steps == 3 * (6 + 6 + 7 + 7 + 8 + 8)
    own = by_stage["training"]
    assert (own.users, own.items, own.steps) == (3, 12, 3)
    assert own.per_user == 4 * 20_971_520 // 2
    numbers = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    # Forward, forward again and the gradient of x: three times two FLOPs per number and token.
    assert 6 * numbers * own.tokens < own.flops < 1.1 * 6 * numbers * own.tokens
    # 989 TFLOP/s, a quarter of them.
    assert own.seconds == pytest.approx(own.flops / 247.25e12)
    text = plan_text(options, model, [plan])
    assert "| meta-LoRAs | mta | 6 | 81 | 126 |" in text
    assert "8.03 G parameters, 16.1 GB in bfloat16" in text
    assert "989 TFLOP/s at 25% of them (assumed)" in text
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows} == {11}


def test_what_is_assumed_of_the_model_is_said_once(where: Store, tmp_path: Path) -> None:
    options, prepared = users_at(tmp_path, preset="paper", methods=["mta"])
    model = planned(options)
    plans = [plan_task(options, "LaMP-2M", prepared, where, model, items) for items in (None, 2)]
    assert not any(note in plan.notes for plan in plans for note in model.notes)
    assert model.notes
    plans[1].notes.append("of this one only")
    text = plan_text(options, model, plans)
    own, everything = text.split("## All of 2")
    for note in model.notes:
        assert (own.count(note), everything.count(f"* {note}\n")) == (0, 1)
    assert "* of this one only\n" in own
    assert "of this one only" not in everything
    assert "\n\n\n" not in text


def test_numbers_are_short() -> None:
    assert [short(n) for n in (0, 7, 999, 999.6, 1234, 45_600, 7.89e14, 2e24)] == [
        "0", "7", "999", "1 k", "1.23 k", "45.6 k", "789 T", "2e+03 Z",
    ]  # fmt: skip
    assert [size(n) for n in (180, 41_943_040)] == ["180 B", "41.9 MB"]
    assert [hours(s) for s in (0.0, 35.9, 36.0, 4500.0)] == ["", "< 0.01", "0.01", "1.25"]

"""The stages one after another on a tiny given base model, called without a flow or a server.

What is pinned: one user's new item is one user's work, from the embedding to the answers; and the
answers are those that stock PEFT and transformers give from the user's exported folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import meta_lora, stacking
from tasks.base_model import base_model
from tasks.config import derive_seed, resolve
from tasks.errors import InputError
from tasks.export import export
from tasks.fusion import read_recipes
from tasks.lora.adapters import Lora, write_peft
from tasks.lora.bank import read_bank
from tasks.lora.base import load_base
from tasks.lora.batches import encode
from tasks.lora.grouped import fresh, shapes_of
from tasks.lora.merge import merge
from tasks.lora.train import Recipe, epochs
from tasks.report.files import run_files, write_run
from tasks.stage import store
from tests.unit.lora import peft_reference
from tests.unit.lora.helpers import same
from tests.unit.stages.pipeline import OPTIONS, ROLES, predictions, run, stock_answers
from tests.unit.stages.users import result, user


def test_all_is_made_and_then_found(place: Path, first: dict[str, Any]) -> None:
    assert {name for names in first["states"].values() for name in names} == {"Completed"}
    assert len(first["states"]["meta_lora"]) == 3
    again = run(place, ROLES)
    assert {name for names in again["states"].values() for name in names} == {"Cached"}
    for part in ("prepared", "base", "anchors", "bank", "fusion"):
        assert again[part] == first[part] | {"cached": True}
    assert again["stacking"]["mta"] == [first["stacking"]["mta"][0] | {"cached": True}]
    for method, scored in again["scores"].items():
        assert scored == first["scores"][method] | {"cached": True}


def test_anchors_with_too_few_items_are_left_out(first: dict[str, Any]) -> None:
    """anchor-0 has 3 items and 4 are asked."""
    value = first["anchors"]["value"]
    names = [item["user_id"] for item in value["anchors"]]
    assert sorted(names) == ["anchor-1", "anchor-2", "anchor-3"]
    assert (value["candidates"], value["eligible"]) == (4, 3)
    assert first["bank"]["value"]["ids"] == names


def test_one_users_new_item_is_one_users_work(
    place: Path, first: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    where = store()
    changed_user = user("few-1", 5, queries=2)
    changed_user["query"] = ROLES["few_shot"][1]["query"]
    few_shot = [ROLES["few_shot"][0], changed_user, ROLES["few_shot"][2]]
    capsys.readouterr()
    changed = run(place, ROLES | {"few_shot": few_shot})
    out = capsys.readouterr().out
    assert "embedding 1 users, 8 known" in out
    assert "mta: training 1 users, 2 known" in out
    assert "merge_only: answering for 1 users, 2 known" in out
    assert "mta: answering for 1 users, 2 known" in out
    # The base model answers the same questions as before; nobody's anchor is trained again.
    for stage in ("base", "predict base", "score base", "bank"):
        assert changed["states"][stage] == ["Cached"]
    assert changed["states"]["meta_lora"] == ["Cached"] * 3
    before, after = (
        read_bank(where.open(item["stacking"]["mta"][0]["ref"]).folder / "stacked.safetensors")
        for item in (first, changed)
    )
    assert same(before.lora("few-0"), after.lora("few-0"))
    assert same(before.lora("few-2"), after.lora("few-2"))
    assert not same(before.lora("few-1"), after.lora("few-1"))
    old, new = (predictions(where, item, "mta") for item in (first, changed))
    assert old.keys() == new.keys()
    assert {query: text for query, text in new.items() if not query.startswith("few-1")} == {
        query: text for query, text in old.items() if not query.startswith("few-1")
    }


def test_an_anchors_new_item_trains_that_anchor(place: Path, first: dict[str, Any]) -> None:
    anchor_users = [*ROLES["anchor"][:3], user("anchor-3", 7)]
    changed = run(place, ROLES | {"anchor": anchor_users})
    states = dict(zip(changed["bank"]["value"]["ids"], changed["states"]["meta_lora"], strict=True))
    assert states == {"anchor-1": "Cached", "anchor-2": "Cached", "anchor-3": "Completed"}
    assert changed["states"]["bank"] == ["Completed"]


def test_the_way_of_merging_is_no_part_of_recipe_or_bank(
    place: Path, first: dict[str, Any]
) -> None:
    changed = run(place, ROLES, fusion={"top_m": 2, "weights": "cosine", "merge": "factors"})
    for stage in ("embed", "anchors", "bank", "fusion", "predict base"):
        assert changed["states"][stage] == ["Cached"]
    for stage in ("stacking", "predict merge_only", "predict mta"):
        assert changed["states"][stage] == ["Completed"]


def test_answers_are_those_of_the_exported_folder(
    place: Path, first: dict[str, Any], tmp_path: Path
) -> None:
    """METHOD: any user exports as ONE ordinary PEFT folder. The compact prompt is text and cue."""
    where = store()
    write_run("run-1", first["config"], [first])
    assert run_files(where)[0].name == "run-1.json"
    saved = {"config": first["config"], "seeds": {"0": {"LaMP-2M": first}}}
    personal = predictions(where, first, "mta")
    plain = predictions(where, first, "base")
    assert personal != plain
    for number in range(3):
        name = f"few-{number}"
        base = export(where, saved, "LaMP-2M", "mta", name, tmp_path / name)
        assert base == place / "model"
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        # The model's name, not a path of this machine.
        assert config["base_model_name_or_path"] == "model"
        prompts = [f"description: {name} film number {n} tag:" for n in (4, 5)]
        queries = [f"{name}-q{n}" for n in range(2)]
        assert [personal[q] for q in queries] == stock_answers(place, tmp_path / name, prompts)
        assert [plain[q] for q in queries] == stock_answers(place, None, prompts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few-0", "few-1", "few-2"]


def test_merge_only_answers_are_those_of_the_merged_folder(
    place: Path, first: dict[str, Any], tmp_path: Path
) -> None:
    where = store()
    bank = read_bank(where.open(first["bank"]["ref"]).folder / "bank.safetensors")
    recipe = read_recipes(where, first["fusion"])["few-2"]
    loras = [bank.lora(anchor) for anchor in recipe["anchors"]]
    write_peft(tmp_path / "merged", merge(loras, recipe["weights"], "exact"), "base")
    answers = predictions(where, first, "merge_only")
    prompts = [f"description: few-2 film number {n} tag:" for n in (4, 5)]
    assert [answers[f"few-2-q{n}"] for n in range(2)] == stock_answers(
        place, tmp_path / "merged", prompts
    )


@pytest.mark.parametrize("name", ["few-0", "few-2"])
def test_stacked_is_trained_on_top_of_merged(place: Path, first: dict[str, Any], name: str) -> None:
    """Against stock PEFT that trains this user alone, the merged LoRA active underneath.

    On the bare base the same training ends elsewhere.
    """
    where = store()
    bank = read_bank(where.open(first["bank"]["ref"]).folder / "bank.safetensors")
    recipe = read_recipes(where, first["fusion"])[name]
    anchors_loras = [bank.lora(anchor) for anchor in recipe["anchors"]]
    merged = peft_reference.merged_by_hand(anchors_loras, recipe["weights"], "exact")
    options = resolve({"stacking": OPTIONS["stacking"]}).stacking
    fields = Recipe.__dataclass_fields__
    training = Recipe(**{field: getattr(options, field) for field in fields})
    seed = derive_seed(0, "stacking", name)
    base = load_base(place / "model", max_tokens=64, device="cpu")
    samples = [
        encode(base, f"description: {item['description']} tag:", item["tag"])
        for one in ROLES["few_shot"]
        if one["user_id"] == name
        for item in one["profile"]
    ]
    shapes = shapes_of(base.model, "all-linear", 2)
    split = shapes.split(fresh(shapes, [seed]))
    start = Lora({layer: (a[0], b[0]) for layer, (a, b) in split.items()}, 2.0)
    steps = list(epochs(len(samples), training, seed))
    shard = read_bank(where.open(first["stacking"]["mta"][0]["ref"]).folder / "stacked.safetensors")
    near, far = (
        peft_reference.largest_difference(
            shard.lora(name),
            peft_reference.train(base.model, under, start, samples, steps, training)[0],
        )
        for under in (merged, None)
    )
    # Adam at a rate of 0.03 makes rounding errors visible: see `test_group_train`.
    assert near < 2e-3
    assert far > 2e-2


def test_other_stacking_is_other_answers_of_mta_alone(place: Path, first: dict[str, Any]) -> None:
    changed = run(place, ROLES, stacking=OPTIONS["stacking"] | {"rank": 3})
    for stage in ("stacking", "predict mta", "score mta"):
        assert changed["states"][stage] == ["Completed"]
    for stage in ("meta_lora", "fusion", "predict base", "predict merge_only"):
        assert set(changed["states"][stage]) == {"Cached"}
    batched = run(place, ROLES, stacking=OPTIONS["stacking"] | {"users_per_job": 1})
    assert batched["states"]["stacking"] == ["Cached"]


def test_what_a_stacked_lora_depends_on(first: dict[str, Any]) -> None:
    """This user's history and recipe, with the same recipe or the same history as before."""
    config = resolve(first["config"])
    given = stacking.Inputs(first["prepared"], first["base"], first["bank"], first["fusion"])
    recipes = read_recipes(store(), first["fusion"])
    me = stacking.few_shot_users(store(), given, ["few-1"])[0]

    def key(user: dict[str, Any] = me, **changes: Any) -> str:
        mine = recipes | {"few-1": recipes["few-1"] | changes}
        return stacking.stacked_key(config, "LaMP-2M", "mta", given, user, mine)

    assert key() == key(me | {"query": []}) == key(similarities=[0.0, 0.0])
    item = {"id": "x", "text": "another film", "answer": "comedy"}
    others = [
        key(me | {"profile": [*me["profile"], item]}),
        key(me | {"profile": me["profile"][::-1]}),
        key(weights=[0.9, 0.1]),
        key(anchors=recipes["few-1"]["anchors"][::-1]),
    ]
    assert len({key(), *others}) == 5


def test_export_of_what_is_not_there(first: dict[str, Any], tmp_path: Path) -> None:
    where = store()
    saved = {"config": first["config"], "seeds": {"0": {"LaMP-2M": first}}}
    for seed, lamp_task, method, name, words in (
        (5, "LaMP-2M", "mta", "few-0", "--seed 5: not in this run; it has 0"),
        (0, "LaMP-3", "mta", "few-0", "--lamp-task LaMP-3: not in this run; it has LaMP-2M"),
        (0, "LaMP-2M", "rag", "few-0", "--method rag: not in this run; it has merge_only, mta"),
        (0, "LaMP-2M", "mta", "../../x", r"--user \.\./\.\./x: no few-shot user of this run"),
    ):
        with pytest.raises(InputError, match=words):
            export(where, saved, lamp_task, method, name, tmp_path / "new", seed)
    with pytest.raises(InputError, match="is there already"):
        export(where, saved, "LaMP-2M", "mta", "few-0", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_of_the_bank(first: dict[str, Any]) -> None:
    recipes = read_recipes(store(), first["fusion"])
    assert sorted(recipes) == ["few-0", "few-1", "few-2"]
    for recipe in recipes.values():
        assert len(recipe["anchors"]) == 2
        assert set(recipe["anchors"]) <= set(first["bank"]["value"]["ids"])
        assert sum(recipe["weights"]) == pytest.approx(1)


def test_work_is_counted(first: dict[str, Any]) -> None:
    """4 items in batches of 2, twice: 4 steps. Rank 2 of fourteen layers in float32.

    Bytes: 4 * 2 * the sum of (in + out): q and o 32 + 32, k and v 32 + 16, gate and up 32 + 48,
    down 48 + 32, in two blocks.
    """
    value = first["stacking"]["mta"][0]["value"]
    assert [item["steps"] for item in value["work"]] == [4, 4, 4]
    sides = 2 * (2 * 64 + 2 * 48 + 3 * 80)
    assert value["bytes_per_user"] == 4 * 2 * sides
    scored = first["scores"]["mta"]["value"]
    assert (scored["users"], scored["queries"], scored["method"]) == (3, 6, "mta")


def test_a_given_model_must_be_safetensors(place: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"x")
    for model, words in (
        (tmp_path / "model", r"needs \*\.safetensors weights and has only pickled"),
        (tmp_path / "absent", "there is no such folder"),
    ):
        config = resolve({"base": {"model": str(model)}}).model_dump(mode="json")
        state = base_model.fn(config, "LaMP-2M", {})
        assert state.is_failed()
        with pytest.raises(InputError, match=words):
            raise InputError(state.message)


def test_a_stacked_lora_that_fails_is_named_and_finite(
    place: Path, first: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other users of the job have what they would have without it."""
    from tasks.lora import group_train

    real = group_train.train_group

    def failing(base: Any, layers: Any, shapes: Any, samples: Any, *rest: Any, **more: Any) -> Any:
        frozen = more["frozen"]

        def parts(users: Any) -> Any:
            made = frozen(users)
            for part in made.values():
                for row, number in enumerate(users):
                    if number == 1:
                        part.b[row] = float("nan")
            return made

        return real(base, layers, shapes, samples, *rest, **(more | {"frozen": parts}))

    inputs = {
        "prepared": first["prepared"],
        "base": first["base"],
        "banked": first["bank"],
        "fused": first["fusion"],
    }
    users = first["prepared"]["value"]["few_shot"]
    config = resolve(first["config"] | {"seed": 1}).model_dump(mode="json")
    arguments = (config, "LaMP-2M", inputs, "mta", 0, users)
    with monkeypatch.context() as patch:
        patch.setattr(group_train, "train_group", failing)
        made = result(stacking.stacking.fn(*arguments))
    where = store()
    assert [work["failed"] for work in made["value"]["work"]] == [False, True, False]
    assert [work["steps"] for work in made["value"]["work"]] == [4, 1, 4]
    shard = read_bank(where.open(made["ref"]).folder / "stacked.safetensors")
    for a, b in shard.layers.values():
        assert torch.isfinite(a).all()
        assert torch.isfinite(b).all()
        assert not b[1].any()
        assert b[0].any()
        assert b[2].any()


def test_an_anchor_that_fails_is_one_line(
    place: Path, first: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.lora import gradients

    real = gradients.label_losses
    monkeypatch.setattr(gradients, "label_losses", lambda *given: real(*given) * float("inf"))
    config = resolve(first["config"] | {"seed": 2}).model_dump(mode="json")
    anchor = {"user_id": "anchor-1", "members": ["anchor-1"]}
    state = meta_lora.meta_lora.fn(config, "LaMP-2M", first["prepared"], first["base"], [anchor])
    assert state.is_failed()
    assert state.message == (
        "anchor anchor-1: the loss was not finite at step 1; lower meta_lora.learning_rate"
    )

"""The stages one after another on a tiny given base model, called without a flow or a server.

What is pinned: one user's new item is one user's work, from the embedding to the answers; and the
answers are those that stock PEFT and transformers give from the user's LoRAs as one PEFT folder.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.answer import how_answered
from tasks.bank import meta_lora
from tasks.base_model import identified
from tasks.config.options import StackingOptions
from tasks.errors import InputError
from tasks.lora import group_train, grouped_engine
from tasks.lora.adapters import Lora, write_peft
from tasks.lora.bank import Bank, read_bank
from tasks.lora.base import load_base
from tasks.lora.batches import encode
from tasks.lora.grouped import fresh, shapes_of
from tasks.lora.merge import concatenate, merge
from tasks.lora.train import epochs
from tasks.model import training_from
from tasks.recipes import Merger, read_recipes
from tasks.record import derive_seed, key_of, library_versions
from tasks.results.models import Anchor
from tasks.results.run import Cell, Merging
from tasks.results.store import store
from tasks.stacking import Batch, merged_and_trained, read_work
from tasks.text.questions import setting_of
from tasks.users import users_in_order
from tests.unit.lora import peft_reference
from tests.unit.lora.helpers import same
from tests.unit.stages.pipeline import OPTIONS, ROLES, predictions, run, stage_keys, stock_answers
from tests.unit.stages.users import user

FEW_SHOT = ["few-0", "few-1", "few-2"]
NO_WORK: dict[str, list[Any]] = {
    "embed": [], "meta_lora": [], "evidence": [], "stacking": [], "answers": []
}  # fmt: skip


def merging_of(cell: Cell) -> Merging:
    found = cell.merging("mta")
    assert found is not None
    return found


def bank_of(cell: Cell) -> Bank:
    return read_bank(store().path(merging_of(cell).merged.bank.file))


def stacked_of(cell: Cell) -> Bank:
    (answers,) = cell.answers["mta"]
    assert answers.stacked is not None
    return read_bank(store().path(answers.stacked))


def merged_of(cell: Cell, name: str) -> Lora:
    bank, recipe = bank_of(cell), read_recipes(merging_of(cell).merged.recipes)[name]
    loras = [bank.lora(anchor) for anchor in recipe.anchors]
    return merge(loras, list(recipe.weights), "exact")


def batch_of(cell: Cell, names: list[str], **changes: Any) -> Batch:
    """A batch of the method mta."""
    method, users = cell.config.method("mta"), cell.users
    fields = {
        "users": users_in_order(users.few_shot, names),
        "how": how_answered(method),
        "merger": Merger(merging_of(cell).merged),
        "fitted": None,
        "setting": setting_of(cell.config, method, users, cell.base),
    }
    return Batch(**(fields | changes))


def test_all_is_made_and_then_found(place: Path, first: Cell, work: dict[str, list[Any]]) -> None:
    with stage_keys() as before:
        again = run(place, ROLES)
    with stage_keys() as after:
        run(place, ROLES)
    assert before == after
    assert {name: len(keys) for name, keys in before.items()} == {
        "prepare": 1, "given_model": 1, "embed": 1, "clusters": 1, "anchors": 1, "meta_lora": 1,
        "bank": 1, "fusion": 1, "answers": 3, "compare": 1,
    }  # fmt: skip
    assert work == NO_WORK
    assert key_of(again) == key_of(first)
    assert again.answers["mta"][0].work == first.answers["mta"][0].work


def test_with_other_libraries_all_is_made_again(
    place: Path, first: Cell, work: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version
    with stage_keys() as before:
        run(place, ROLES)
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0" if name == "torch" else real(name)
    )
    library_versions.cache_clear()
    try:
        with stage_keys() as after:
            run(place, ROLES)
    finally:
        library_versions.cache_clear()
    assert {name for name in before if set(before[name]) & set(after[name])} <= {
        "prepare", "clusters", "anchors", "bank", "fusion", "compare"
    }  # fmt: skip
    assert [len(calls) for calls in work.values()] == [1, 1, 0, 1, 3]
    assert [sorted(one) for one in work["answers"]] == [FEW_SHOT] * 3


def test_anchors_with_too_few_items_are_left_out(first: Cell) -> None:
    """anchor-0 has 3 items and 4 are asked."""
    chosen = merging_of(first).chosen
    names = [one.name for one in chosen.anchors]
    assert sorted(names) == ["anchor-1", "anchor-2", "anchor-3"]
    assert (chosen.candidates, chosen.eligible) == (4, 3)
    assert list(bank_of(first).ids) == merging_of(first).merged.bank.names == names


def test_one_users_new_item_is_one_users_work(
    place: Path, first: Cell, work: dict[str, list[Any]]
) -> None:
    changed_user = user("few-1", 5, queries=2)
    changed_user["query"] = ROLES["few_shot"][1]["query"]
    few_shot = [ROLES["few_shot"][0], changed_user, ROLES["few_shot"][2]]
    changed = run(place, ROLES | {"few_shot": few_shot})
    # The base model answers the same questions as before; nobody's anchor is trained again.
    assert work == NO_WORK | {
        "embed": [["few-1"]], "stacking": [1], "answers": [["few-1"], ["few-1"]]
    }  # fmt: skip
    assert key_of(changed.base) == key_of(first.base)
    assert key_of(merging_of(changed).merged.bank) == key_of(merging_of(first).merged.bank)
    before, after = stacked_of(first), stacked_of(changed)
    assert same(before.lora("few-0"), after.lora("few-0"))
    assert same(before.lora("few-2"), after.lora("few-2"))
    assert not same(before.lora("few-1"), after.lora("few-1"))
    old, new = predictions(first, "mta"), predictions(changed, "mta")
    assert old.keys() == new.keys()
    assert {query: text for query, text in new.items() if not query.startswith("few-1")} == {
        query: text for query, text in old.items() if not query.startswith("few-1")
    }


def test_an_anchors_new_item_trains_that_anchor(
    place: Path, first: Cell, work: dict[str, list[Any]]
) -> None:
    anchor_users = [*ROLES["anchor"][:3], user("anchor-3", 7)]
    changed = run(place, ROLES | {"anchor": anchor_users})
    assert work["meta_lora"] == [["anchor-3"]]
    before, after = bank_of(first), bank_of(changed)
    assert {name for name in before.ids if same(before.lora(name), after.lora(name))} == {
        "anchor-1", "anchor-2"
    }  # fmt: skip


def test_the_way_of_merging_is_no_part_of_recipe_or_bank(
    place: Path, first: Cell, work: dict[str, list[Any]]
) -> None:
    changed = run(place, ROLES, fusion={"top_m": 2, "weights": "cosine", "merge": "factors"})
    before, after = merging_of(first).merged, merging_of(changed).merged
    assert (before.how, after.how) == ("exact", "factors")
    assert key_of(before.bank, before.recipes) == key_of(after.bank, after.recipes)
    assert work == NO_WORK | {"stacking": [3], "answers": [FEW_SHOT, FEW_SHOT]}


def test_answers_are_those_of_one_peft_folder(place: Path, first: Cell, tmp_path: Path) -> None:
    """docs/method.md: a user exports as ONE ordinary PEFT folder. A compact prompt is text, cue."""
    personal, plain = predictions(first, "mta"), predictions(first, "base")
    assert personal != plain
    for name in FEW_SHOT:
        both = concatenate(merged_of(first, name), stacked_of(first).lora(name))
        write_peft(tmp_path / name, both, "base")
        prompts = [f"description: {name} film number {n} tag:" for n in (4, 5)]
        queries = [f"{name}-q{n}" for n in range(2)]
        assert [personal[q] for q in queries] == stock_answers(place, tmp_path / name, prompts)
        assert [plain[q] for q in queries] == stock_answers(place, None, prompts)


def test_merge_only_answers_are_those_of_the_merged_folder(
    place: Path, first: Cell, tmp_path: Path
) -> None:
    write_peft(tmp_path / "merged", merged_of(first, "few-2"), "base")
    answers = predictions(first, "merge_only")
    prompts = [f"description: few-2 film number {n} tag:" for n in (4, 5)]
    assert [answers[f"few-2-q{n}"] for n in range(2)] == stock_answers(
        place, tmp_path / "merged", prompts
    )


@pytest.mark.parametrize("name", ["few-0", "few-2"])
def test_stacked_is_trained_on_top_of_merged(place: Path, first: Cell, name: str) -> None:
    """Against stock PEFT that trains this user alone, the merged LoRA active underneath.

    On the bare base the same training ends elsewhere.
    """
    bank, recipe = bank_of(first), read_recipes(merging_of(first).merged.recipes)[name]
    anchors_loras = [bank.lora(anchor) for anchor in recipe.anchors]
    merged = peft_reference.merged_by_hand(anchors_loras, recipe.weights, "exact")
    training = training_from(StackingOptions(**OPTIONS["stacking"]))
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
    near, far = (
        peft_reference.largest_difference(
            stacked_of(first).lora(name),
            peft_reference.train(base.model, under, start, samples, steps, training)[0],
        )
        for under in (merged, None)
    )
    # Adam at a rate of 0.03 makes rounding errors visible: see `test_group_train`.
    assert near < 2e-3
    assert far > 2e-2


def test_other_stacking_is_other_answers_of_mta_alone(
    place: Path, first: Cell, work: dict[str, list[Any]]
) -> None:
    run(place, ROLES, stacking=OPTIONS["stacking"] | {"rank": 3})
    assert work == NO_WORK | {"stacking": [3], "answers": [FEW_SHOT]}
    work["stacking"].clear()
    work["answers"].clear()
    batched = run(place, ROLES, stacking=OPTIONS["stacking"] | {"users_per_job": 1})
    assert work == NO_WORK
    assert [one.users for one in batched.answers["mta"]] == [(name,) for name in FEW_SHOT]
    assert predictions(batched, "mta") == predictions(first, "mta")


def test_what_a_stacked_lora_depends_on(first: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """This user's history and recipe, with the same recipe or the same history as before."""
    recipes = read_recipes(merging_of(first).merged.recipes)
    recipe = recipes["few-1"]
    me = users_in_order(first.users.few_shot, ["few-1"])[0]

    def key(user: dict[str, Any] = me, **changes: Any) -> str:
        mine = recipes | {"few-1": recipe.model_copy(update=changes)}
        monkeypatch.setattr("tasks.recipes.read_recipes", lambda _: mine)
        (found,) = merged_and_trained(batch_of(first, [], users=[user])).keys
        return key_of(found)

    assert key() == key(me | {"query": []}) == key(similarities=(0.0, 0.0))
    item = {"id": "x", "text": "another film", "answer": "comedy"}
    others = [
        key(me | {"profile": [*me["profile"], item]}),
        key(me | {"profile": me["profile"][::-1]}),
        key(weights=(0.9, 0.1)),
        key(anchors=recipe.anchors[::-1]),
    ]
    assert len({key(), *others}) == 5


def test_recipes_are_of_the_bank(first: Cell) -> None:
    merged = merging_of(first).merged
    recipes = read_recipes(merged.recipes)
    assert sorted(recipes) == FEW_SHOT
    assert read_recipes(merged.recipes, ["few-1"]) == {"few-1": recipes["few-1"]}
    for recipe in recipes.values():
        assert len(recipe.anchors) == 2
        assert set(recipe.anchors) <= set(merged.bank.names)
        assert sum(recipe.weights) == pytest.approx(1)


def test_work_is_counted(first: Cell) -> None:
    """4 items in batches of 2, twice: 4 steps. Rank 2 of fourteen layers in float32.

    Bytes: 4 * 2 * the sum of (in + out): q and o 32 + 32, k and v 32 + 16, gate and up 32 + 48,
    down 48 + 32, in two blocks.
    """
    (answers,) = first.answers["mta"]
    assert [work.steps for work in read_work(store().path(answers.work))] == [4, 4, 4]
    sides = 2 * (2 * 64 + 2 * 48 + 3 * 80)
    assert answers.bytes_per_user == 4 * 2 * sides
    scored = first.scored("mta")
    assert scored is not None
    assert (scored.users, scored.queries, scored.method) == (3, 6, "mta")


def test_a_given_model_must_be_safetensors(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"x")
    for model, words in (
        (tmp_path / "model", r"needs \*\.safetensors weights and has only pickled"),
        (tmp_path / "absent", "there is no such folder"),
    ):
        with pytest.raises(InputError, match=words):
            identified(str(model))


def test_a_stacked_lora_that_fails_is_named_and_finite(
    first: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other users of the job have what they would have without it."""
    real = grouped_engine.train_group

    def failing(base: Any, layers: Any, shapes: Any, samples: Any, *rest: Any, **more: Any) -> Any:
        frozen = more["frozen"]

        def parts(users: Any) -> Any:
            made = frozen(users)
            for _, b in made.layers.values():
                for row, number in enumerate(users):
                    if number == 1:
                        b[row] = float("nan")
            return made

        return real(base, layers, shapes, samples, *rest, **(more | {"frozen": parts}))

    with monkeypatch.context() as patch:
        patch.setattr(grouped_engine, "train_group", failing)
        setting = batch_of(first, FEW_SHOT).setting.model_copy(update={"seed": 1})
        made = merged_and_trained(batch_of(first, FEW_SHOT, setting=setting))
    assert [work.failed for work in made.works] == [False, True, False]
    assert [work.steps for work in made.works] == [4, 1, 4]
    assert made.loras is not None
    for a, b in made.loras.layers.values():
        assert torch.isfinite(a).all()
        assert torch.isfinite(b).all()
        assert not b[1].any()
        assert b[0].any()
        assert b[2].any()


def test_an_anchor_that_fails_is_one_line(first: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    real = group_train.label_losses
    monkeypatch.setattr(group_train, "label_losses", lambda *given: real(*given) * float("inf"))
    method, users = first.config.method("mta"), first.users
    setting = setting_of(first.config, method, users, first.base)
    anchor = Anchor(name="anchor-1", items=4, cluster=0, members=("anchor-1",))
    other = setting.model_copy(update={"seed": 2})
    made = meta_lora(method.meta_lora, (anchor,), users.anchor, other)
    assert made.loras == ()
    assert made.failed == (
        "anchor anchor-1: the loss was not finite at step 1; lower meta_lora.learning_rate",
    )

"""The base model adapted to the task: what it is trained on, what it is then, and what it keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tasks.base_model import load, model_parts
from tasks.config import RunConfig, resolve
from tasks.errors import InputError
from tasks.export import export
from tasks.lora.base import Base
from tasks.lora.batches import Encoded, answer_logits, collate
from tasks.prepare import users_of
from tasks.questions import encode_all, user_queries
from tasks.stage import store
from tasks.task_adapt import chosen_items
from tests.unit.stages.pipeline import ROLES, predictions, run, stock_answers
from tests.unit.stages.users import user

ASKING = ROLES | {"base": [user("base-1", 3, queries=4), user("base-2", 3, queries=2)]}
ADAPT: dict[str, Any] = {
    "enabled": True,
    "rank": 3,
    "alpha": 6.0,
    "learning_rate": 0.02,
    "epochs": 8,
    "batch_size": 2,
}


def configured(place: Path, **how: Any) -> RunConfig:
    return resolve({"base": {"model": str(place / "model"), "task_adapt": ADAPT | how}})


@pytest.fixture(scope="module")
def adapted(place: Path) -> dict[str, Any]:
    return run(place, ASKING, base={"task_adapt": ADAPT})


def samples_of(base: Base, done: dict[str, Any]) -> list[Encoded]:
    """The base users' queries, encoded one by one."""
    options = RunConfig.model_validate(done["config"])
    asked = [
        question
        for user in users_of(store(), done["prepared"], "base")
        for question in user_queries(options, "LaMP-2M", "", user)
    ]
    return encode_all(base, asked, answers=True)


def loss(base: Base, samples: list[Encoded]) -> float:
    batch = collate(base, samples)
    with torch.no_grad():
        logits = answer_logits(base.model, batch)
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()))


def both(place: Path, done: dict[str, Any]) -> tuple[Base, Base]:
    """The model as given and as adapted, loaded by the stages' own way."""
    options, where = RunConfig.model_validate(done["config"]), store()
    plain = load(options, where, {"ref": done["base"]["ref"], "value": done["base"]["value"]})
    return plain, load(options, where, done["base"])


def test_the_base_users_loss_falls(place: Path, adapted: dict[str, Any]) -> None:
    plain, better = both(place, adapted)
    samples = samples_of(plain, adapted)
    value = adapted["base"]["adapter"]["value"]
    # Four and two queries; three steps of two in each of eight epochs.
    assert (value["items"], value["steps"], len(value["losses"])) == (6, 24, 24)
    length = sum(len(sample.prompt) + len(sample.answer) for sample in samples)
    assert value["tokens"] == 8 * length
    assert loss(better, samples) < 0.7 * loss(plain, samples)


def test_it_is_the_model_that_peft_merges(place: Path, adapted: dict[str, Any]) -> None:
    _, better = both(place, adapted)
    folder = store().open(adapted["base"]["adapter"]["ref"]).folder / "adapter"
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        ours, theirs = better.model(ids).logits, merged(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(place / "model")(ids).logits
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - plain).abs().max() > 0.1


def test_what_comes_after_is_keyed_by_it(place: Path, adapted: dict[str, Any]) -> None:
    """And only by what it is: `enabled` alone, or an option that it does not read, is no key."""
    options = RunConfig.model_validate(adapted["config"])
    base = adapted["base"]
    without = {name: base[name] for name in ("ref", "value")}
    plain = model_parts(options, without)
    assert plain == model_parts(RunConfig(base=options.base.model_copy()), without)
    assert "task_adapt" not in plain
    assert model_parts(options, base) == plain | {"task_adapt": base["adapter"]["ref"]["sha256"]}
    off = run(place, ASKING)
    assert "adapter" not in off["base"]
    for stage in ("embedded", "bank", "fusion"):
        assert off[stage]["ref"] != adapted[stage]["ref"]
    for stage in ("meta_lora", "stacking", "predict base", "predict mta"):
        assert set(off["states"][stage]) == {"Completed"}
    again = run(place, ASKING, base={"task_adapt": ADAPT})
    assert {name for names in again["states"].values() for name in names} == {"Cached"}
    other = run(place, ASKING, base={"task_adapt": ADAPT | {"rank": 2}}, recipes_only=True)
    assert other["states"]["task_adapt"] == ["Completed"]
    assert other["states"]["base"] == ["Cached"]


def test_the_exported_folder_goes_with_the_model_as_given(
    place: Path, adapted: dict[str, Any], tmp_path: Path
) -> None:
    saved = {"config": adapted["config"], "seeds": {"0": {"LaMP-2M": adapted}}}
    answers = predictions(store(), adapted, "mta")
    export(store(), saved, "LaMP-2M", "mta", "few-1", tmp_path / "few-1")
    prompts = [f"description: few-1 film number {n} tag:" for n in (4, 5)]
    assert [answers[f"few-1-q{n}"] for n in range(2)] == stock_answers(
        place, tmp_path / "few-1", prompts
    )


def test_on_what_it_is_trained(place: Path, adapted: dict[str, Any]) -> None:
    """OPPU: base users' queries; here also their items, each asked about itself."""
    for train_on, items in (("profile", 6), ("both", 12)):
        how = ADAPT | {"train_on": train_on, "epochs": 1}
        other = run(place, ASKING, base={"task_adapt": how}, recipes_only=True)
        assert other["base"]["adapter"]["value"]["items"] == items


def test_at_most_so_many_items_by_seed(place: Path) -> None:
    assert list(chosen_items(configured(place), 5)) == [0, 1, 2, 3, 4]
    assert list(chosen_items(configured(place, max_items=5), 5)) == [0, 1, 2, 3, 4]
    few = list(chosen_items(configured(place, max_items=4), 100))
    assert len(set(few)) == 4
    assert few == sorted(few)
    assert few == list(chosen_items(configured(place, max_items=4), 100))
    other = resolve(configured(place, max_items=4).model_dump(mode="json") | {"seed": 1})
    assert few != list(chosen_items(other, 100))


def test_without_anything_to_train_on(place: Path) -> None:
    with pytest.raises(InputError, match=r"have no queries.*train_on=profile"):
        chosen_items(configured(place), 0)
    with pytest.raises(InputError, match="have no items"):
        chosen_items(configured(place, train_on="profile"), 0)


def test_defaults_are_oppus() -> None:
    """task_LoRA.py of TamSiuhin/OPPU; no preset has it, as the published MTA code has none."""
    for preset in ("embedded", "paper"):
        assert resolve({"preset": preset}).base.task_adapt.model_dump() == {
            "enabled": False,
            "train_on": "queries",
            "max_items": None,
            "rank": 8,
            "alpha": 8.0,
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "learning_rate": 1e-4,
            "epochs": 3,
            "batch_size": 16,
            "accumulation": 1,
            "schedule": "linear",
            "warmup_share": 0.1,
            "max_grad_norm": 0.3,
            "weight_decay": 0.01,
        }

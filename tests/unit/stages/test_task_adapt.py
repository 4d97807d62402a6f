"""The base model adapted to the task: what it is trained on, what it is then, and what it keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tasks.base_model import base_model, chosen_items
from tasks.config.options import TaskAdaptOptions
from tasks.config.run import resolve
from tasks.errors import InputError
from tasks.export import Finished, export
from tasks.lora.base import Base
from tasks.lora.batches import Encoded, answer_logits, collate, encode
from tasks.prepare import prepared_users
from tasks.record import key_of
from tasks.results.models import Training
from tasks.results.run import Cell, Run
from tasks.results.store import store
from tasks.text.loading import load
from tasks.text.questions import questions_of, user_queries
from tasks.users import users_of
from tests.unit.stages.pipeline import (
    ROLES,
    config_of,
    predictions,
    run,
    stage_keys,
    stock_answers,
)
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
OPTIONS = TaskAdaptOptions(**ADAPT)


@pytest.fixture(scope="module")
def adapted(place: Path) -> Cell:
    return run(place, ASKING, base={"task_adapt": ADAPT})


def training_of(cell: Cell) -> Training:
    assert cell.base.training is not None
    return cell.base.training


def samples_of(base: Base, cell: Cell) -> list[Encoded]:
    """The base users' queries, encoded one by one."""
    questions = questions_of(cell.config.prompt, cell.users, cell.config.base.model)
    asked = [
        question for user in users_of(cell.users.base) for question in user_queries(questions, user)
    ]
    return [encode(base, one.prompt, one.answer) for one in asked]


def loss(base: Base, samples: list[Encoded]) -> float:
    batch = collate(base, samples)
    with torch.no_grad():
        logits = answer_logits(base.model, batch)
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()))


def both(cell: Cell) -> tuple[Base, Base]:
    """The model as given and as adapted, loaded by the stages' own way."""
    plain = load(cell.base.model_copy(update={"adapter": None}), cell.config.compute)
    return plain, load(cell.base, cell.config.compute)


def test_the_base_users_loss_falls(adapted: Cell) -> None:
    plain, better = both(adapted)
    samples = samples_of(plain, adapted)
    training = training_of(adapted)
    # Four and two queries; three steps of two in each of eight epochs.
    assert (training.items, training.steps, len(training.losses)) == (6, 24, 24)
    length = sum(len(sample.prompt) + len(sample.answer) for sample in samples)
    assert training.tokens == 8 * length
    assert loss(better, samples) < 0.7 * loss(plain, samples)


def test_it_is_the_model_that_peft_merges(place: Path, adapted: Cell) -> None:
    _, better = both(adapted)
    assert adapted.base.adapter is not None
    folder = store().path(adapted.base.adapter)
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        ours, theirs = better.model(ids).logits, merged(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(place / "model")(ids).logits
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - plain).abs().max() > 0.1


def test_what_comes_after_is_keyed_by_it(place: Path, adapted: Cell) -> None:
    """And only by what it is: an option of adapting, where nothing is adapted, is no key."""
    with stage_keys() as on:
        again = run(place, ASKING, base={"task_adapt": ADAPT})
    assert key_of(again) == key_of(adapted)
    with stage_keys() as off:
        plain = run(place, ASKING)
    with stage_keys() as unread:
        run(place, ASKING, base={"task_adapt": ADAPT | {"enabled": False}})
    assert off == unread
    assert plain.base.adapter is None
    assert key_of(plain.base) == key_of(adapted.base.model_copy(update={"adapter": None}))
    assert on.keys() - off.keys() == {"task_adapt"}
    alike = {name for name in off if off[name] == on[name]}
    assert alike == {"prepare", "given_model"}
    for stage in ("embed", "meta_lora", "fusion", "answers"):
        assert not set(off[stage]) & set(on[stage])
    with stage_keys() as other:
        config = config_of(place, ASKING, base={"task_adapt": ADAPT | {"rank": 2}})
        base_model(config, prepared_users(config))
    assert other["task_adapt"] != on["task_adapt"]
    assert other["given_model"] == on["given_model"]


def test_the_exported_folder_goes_with_the_model_as_given(
    place: Path, adapted: Cell, tmp_path: Path
) -> None:
    answers = predictions(adapted, "mta")
    saved = Run(id="one", name="one", date="", report="one", config={}, cells=(adapted,))
    export(Finished(saved, "LaMP-2M", "mta"), "few-1", tmp_path / "few-1")
    prompts = [f"description: few-1 film number {n} tag:" for n in (4, 5)]
    assert [answers[f"few-1-q{n}"] for n in range(2)] == stock_answers(
        place, tmp_path / "few-1", prompts
    )


def test_on_what_it_is_trained(place: Path) -> None:
    """OPPU: base users' queries; here also their items, each asked about itself."""
    for train_on, items in (("profile", 6), ("both", 12)):
        how = ADAPT | {"train_on": train_on, "epochs": 1}
        config = config_of(place, ASKING, base={"task_adapt": how})
        training = base_model(config, prepared_users(config)).training
        assert training is not None
        assert training.items == items


def chosen(count: int, seed: int = 0, **changes: Any) -> list[int]:
    return list(chosen_items(OPTIONS.model_copy(update=changes), count, seed))


def test_at_most_so_many_items_by_seed() -> None:
    assert chosen(5) == [0, 1, 2, 3, 4]
    assert chosen(5, max_items=5) == [0, 1, 2, 3, 4]
    few = chosen(100, max_items=4)
    assert len(set(few)) == 4
    assert few == sorted(few)
    assert few == chosen(100, max_items=4)
    assert few != chosen(100, seed=1, max_items=4)


def test_without_anything_to_train_on() -> None:
    with pytest.raises(InputError, match=r"have no queries.*train_on=profile"):
        chosen(0)
    with pytest.raises(InputError, match="have no items"):
        chosen(0, train_on="profile")


def test_defaults_are_oppus() -> None:
    """task_LoRA.py of TamSiuhin/OPPU. These presets leave it off, like the published MTA code."""
    for preset in ("embedded", "paper"):
        assert resolve({"preset": preset}).base.task_adapt.model_dump() == {
            "enabled": False,
            "train_on": "queries",
            "max_items": None,
            "rank": 8,
            "alpha": 8.0,
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "target_parameters": [],
            "learning_rate": 1e-4,
            "epochs": 3,
            "batch_size": 16,
            "accumulation": 1,
            "schedule": "linear",
            "warmup_share": 0.1,
            "max_grad_norm": 0.3,
            "weight_decay": 0.01,
        }

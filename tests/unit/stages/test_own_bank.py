"""A bank of adapters that stock PEFT trained, from their folders to users' LoRAs."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from flows.lamp_task import lamp_task
from tasks.bank import given_adapters, own_bank
from tasks.config.options import BankOptions
from tasks.config.run import resolve
from tasks.errors import InputError
from tasks.export import Finished, export
from tasks.lora.adapters import write_peft
from tasks.lora.base import load_base
from tasks.lora.batches import encode
from tasks.personalise.personaliser import Personaliser
from tasks.plan.model import plan_model
from tasks.plan.stages import Planner
from tasks.recipes import read_recipes
from tasks.record import key_of
from tasks.report.chosen import chosen_by_merging
from tasks.report.notes import cell_notes
from tasks.report.page import report_html
from tasks.results.run import Cell, Run
from tasks.stand_in import planned_by
from tasks.tracking.entries import parts, whole
from tests.unit.lora.helpers import linear_shapes, random_lora
from tests.unit.lora.peft_reference import loss_of
from tests.unit.report.report_case import report_case
from tests.unit.stages.pipeline import ROLES, merging, run, run_config

# Each is trained on one few-shot user's items; the last on a candidate's.
TASTES: dict[str, dict[str, Any]] = {
    "few-0": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
    "few-1": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "few-2": {"r": 3, "lora_alpha": 9, "target_modules": ["down_proj", "o_proj"]},
    "anchor-0": {"r": 1, "lora_alpha": 2, "target_modules": "all-linear"},
}
PEOPLE = {one["user_id"]: one for side in ROLES.values() for one in side}
FUSION = {"weights": "evidence", "top_m": 2}
# Nobody is an anchor, and nobody could be.
ANCHORS = {"min_items": 100}
IDS = torch.tensor([[5, 80, 33, 290, 7, 112, 64, 3], [9, 8, 7, 6, 5, 4, 3, 250]])


@pytest.fixture(scope="module")
def adapters(place: Path) -> Path:
    """A folder of adapters as somebody else trains them: stock PEFT and a plain loop."""
    base = load_base(place / "model", max_tokens=64, device="cpu")
    for name, options in TASTES.items():
        torch.manual_seed(0)
        stock: Any = get_peft_model(
            copy.deepcopy(base.model), LoraConfig(task_type="CAUSAL_LM", **options)
        )
        samples = [
            encode(base, f"description: {item['description']} tag:", item["tag"])
            for item in PEOPLE[name]["profile"]
        ]
        trained = [one for one in stock.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.02)
        for _ in range(12):
            loss_of(stock, samples, sum(len(one.answer) for one in samples)).backward()
            optimizer.step()
            optimizer.zero_grad()
        stock.save_pretrained(place / "adapters" / f"likes-{name}")
    return place / "adapters"


@pytest.fixture(scope="module")
def cell(place: Path, adapters: Path) -> Cell:
    return run(place, ROLES, bank={"adapters": str(adapters)}, fusion=FUSION, anchors=ANCHORS)


def run_of(cell: Cell) -> Run:
    config = resolve({"data": cell.config.data}).model_dump(mode="json")
    about = {"date": "2026-11-28 07:00", "report": "one", "config": config}
    return Run(id="one", name="one", cells=(cell,), **about)


@torch.no_grad()
def logits(place: Path, folder: Path | None = None) -> Tensor:
    """Of stock transformers, with stock PEFT's adapter in `folder`."""
    model: Any = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    if folder:
        model = PeftModel.from_pretrained(model, folder)
    return model(input_ids=IDS).logits


def test_a_run_takes_the_adapters_as_its_bank(cell: Cell) -> None:
    assert list(cell.answers) == ["base", "merge_only", "mta"]
    assert cell.missing == ()
    (own,) = cell.mergings
    assert own.chosen is None
    assert own.merged.bank.names == sorted(f"likes-{name}" for name in TASTES)
    recipes = read_recipes(own.merged.recipes)
    for name in ("few-0", "few-1", "few-2"):
        assert recipes[name].anchors[0] == f"likes-{name}"
        assert recipes[name].similarities == (0.0, 0.0)
        assert sum(recipes[name].weights) == pytest.approx(1)


@pytest.mark.parametrize("name", ["few-0", "few-1", "few-2"])
def test_with_weight_1_an_adapter_is_itself(
    place: Path, adapters: Path, tmp_path: Path, name: str
) -> None:
    """What is exported from one adapter gives the logits of that adapter, both by stock PEFT."""
    bank = {"adapters": str(adapters)}
    alone = run(place, ROLES, bank=bank, fusion=FUSION | {"top_m": 1}, methods=["merge_only"])
    export(Finished(run_of(alone), "LaMP-2M", "merge_only"), name, tmp_path / "lora")
    wanted, plain = logits(place, adapters / f"likes-{name}"), logits(place)
    assert (wanted - plain).abs().max() > 0.1
    assert (logits(place, tmp_path / "lora") - wanted).abs().max() <= 1e-4


def test_the_report_and_mlflow_name_the_adapters(cell: Cell) -> None:
    (found,) = chosen_by_merging(cell)
    names = sorted(f"likes-{name}" for name in TASTES)
    assert (found.by, found.weights.columns, found.weights.rows) == ("adapter", names, names[1:])
    assert found.weights.same_sort > 0.5
    page = report_html(report_case(chosen=[found]))
    assert "The bank holds adapters that were given." in page
    assert "likes-few-1 (1)" in page
    told = "LaMP-2M, merge_only: the bank is 4 given adapters; no anchor was trained"
    assert told in cell_notes(cell)
    made = run_of(cell)
    entries = list(parts(made, [[]]))
    assert [one.name for one in entries] == [f"LaMP-2M anchor {name}" for name in names]
    assert [one.params for one in entries] == [{"lamp_task": "LaMP-2M"}] * 4
    assert len(whole(made).files) == 1


def test_a_new_user_gets_the_adapter_of_such_items(cell: Cell) -> None:
    items = [
        {"id": one["id"], "text": one["description"], "answer": one["tag"]}
        for one in PEOPLE["few-1"]["profile"]
    ]
    (found,) = Personaliser(cell)([{"user_id": "new", "profile": items}])
    assert found.recipe
    assert found.recipe.anchors[0] == "likes-few-1"
    assert len(found.loras) == 2


def test_content_decides_and_not_the_place(
    place: Path, adapters: Path, cell: Cell, tmp_path: Path, work: dict[str, list[Any]]
) -> None:
    listed = [str(shutil.copytree(one, tmp_path / one.name)) for one in sorted(adapters.iterdir())]
    moved = merging(place, ROLES, bank={"adapters": listed}, fusion=FUSION, anchors=ANCHORS)
    assert key_of(moved.merged) == key_of(cell.mergings[0].merged)
    # A wider one beside them: what is known of the others stays.
    base = load_base(place / "model", max_tokens=64, device="cpu")
    wide = random_lora(linear_shapes(base.model), 6, 0.5, seed=3)
    write_peft(tmp_path / "wide", wide, "model")
    more = merging(place, ROLES, bank={"adapters": str(tmp_path)}, fusion=FUSION, anchors=ANCHORS)
    before = cell.mergings[0].merged.bank.members
    assert [one.adapter for one in more.merged.bank.members[:4]] == [one.adapter for one in before]
    assert work["meta_lora"] == work["stacking"] == []


def test_a_plan_reads_the_adapters(place: Path, adapters: Path) -> None:
    config = run_config(
        place, ROLES, bank={"adapters": str(adapters)}, fusion=FUSION, anchors=ANCHORS
    )
    planner = Planner(plan_model(config))
    with planned_by(planner):
        lamp_task(config.for_task("LaMP-2M", 0))
    (plan,) = planner.plans
    rows = {work.stage: work for work in plan.rows}
    assert rows["adapters"].users == 4
    # Twelve items of three users, under four adapters each.
    assert rows["evidence"].items == 12
    assert rows["evidence"].flops > 0
    assert "meta-LoRAs" not in rows


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def tensor(name: str, *size: int) -> Callable[[Path], None]:
    """A tensor more, or in place of one."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors[f"base_model.model.{name}"] = torch.zeros(*size)
        save_file(tensors, folder / "adapter_model.safetensors")

    return change


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def elsewhere(folder: Path) -> None:
    write_peft(folder, random_lora({"model.layers.9.self_attn.q_proj": (32, 32)}, 2, 1.0, 0), "x")


def head(folder: Path) -> None:
    write_peft(folder, random_lora({"lm_head": (300, 32)}, 2, 1.0, 0), "x")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (settings(use_dora=True), "it has use_dora=True"),
        (settings(modules_to_save=["lm_head"]), "it has modules_to_save=['lm_head']"),
        (settings(bias="all"), "it has bias=all"),
        (settings(lora_bias=True), "it has lora_bias=True"),
        (settings(rank_pattern={"q_proj": 8}), "it has rank_pattern={'q_proj': 8}"),
        (settings(alpha_pattern={"q_proj": 8}), "it has alpha_pattern={'q_proj': 8}"),
        (settings(init_lora_weights="pissa_niter_4"), "it has init_lora_weights=pissa_niter_4"),
        (settings(peft_type="IA3"), "it has peft_type=IA3"),
        (tensor("model.embed_tokens.lora_embedding_A", 2, 9), "embed_tokens.lora_embedding_A"),
        (tensor("model.embed_tokens.weight", 2, 9), "it has base_model.model.model.embed_tokens"),
        (tensor("model.layers.0.mlp.up_proj.lora_A.weight", 2, 31), "the LoRA is for (48, 31)"),
        (elsewhere, "base.model: the model has no layer model.layers.9.self_attn.q_proj"),
        (head, "lm_head is the output embedding, which cannot carry a LoRA here"),
        (pickled, "there is no adapter_model.safetensors"),
    ],
)  # fmt: skip
def test_what_is_no_plain_lora_of_the_model_is_refused(
    cell: Cell, adapters: Path, tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    folder = shutil.copytree(adapters / "likes-few-0", tmp_path / "theirs")
    change(folder)
    with pytest.raises(InputError) as refused:
        own_bank(given_adapters(BankOptions(adapters=str(tmp_path))), cell.base)
    message = str(refused.value)
    assert message.startswith(f"{folder}: ")
    assert told in message
    assert "\n" not in message


def test_places_without_adapters_are_refused(adapters: Path, tmp_path: Path) -> None:
    one = adapters / "likes-few-0"
    same = shutil.copytree(one, tmp_path / "other" / one.name)
    for given, told in (
        (str(tmp_path), f"bank.adapters {tmp_path}: neither it nor a folder in it has adapter_"),
        ([str(one), str(same)], f"bank.adapters: {one} and {same} have one name; rename one"),
        (["./absent"], "bank.adapters ./absent: there is no such folder, and it is no hub id"),
    ):
        with pytest.raises(InputError) as refused:
            given_adapters(BankOptions(adapters=given))
        assert str(refused.value).startswith(told)


def test_a_hub_id_is_a_name(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot(model: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((model, revision, allow_patterns))
        return str(adapters / "likes-few-0")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    given = given_adapters(BankOptions(adapters=["some/lora", str(adapters / "likes-few-1")]))
    assert [one.name for one in given] == ["some/lora", "likes-few-1"]
    assert asked == [("some/lora", None, ["adapter_config.json", "adapter_model.safetensors"])]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"fusion": {"weights": "cosine"}}, 'fusion.weights: merge_only takes "cosine", .*give "e'),
        ({"fusion": {"shortlist": 3}}, r"fusion\.shortlist: merge_only takes 3, .*give null"),
        ({"methods": ["base", "mta_published"]}, r'mta_published takes .*\(methods=\["base"\]\)'),
        ({"per_task": {"LaMP-2M": {"fusion": {"shortlist": 2}}}}, "merge_only takes 2"),
        ({"bank": {"adapters": []}}, r"bank\.adapters"),
    ],
)
def test_adapters_are_chosen_by_evidence_alone(given: dict[str, Any], told: str) -> None:
    whole = {"methods": ["base", "merge_only"], "bank": {"adapters": "there"}} | given
    with pytest.raises(InputError, match=told):
        resolve(whole)
    # Without a method that merges, nothing is chosen.
    resolve({"methods": ["base"], "bank": {"adapters": "there"}, "fusion": {"weights": "cosine"}})

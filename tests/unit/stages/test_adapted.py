"""What the LoRAs of a run are on, as the run says it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tasks import base_model as stage_module
from tasks.adapted import adapted_notes
from tasks.base_model import base_model
from tasks.config import resolve
from tasks.lora.base import without_weights
from tasks.lora.tiny import train_tokenizer
from tasks.store.artifacts import Store
from tests.unit.lora.helpers import TEXTS
from tests.unit.lora.test_architectures import ARCHITECTURES
from tests.unit.stages.users import result

# As counted by hand in tests/unit/lora/test_coverage.py.
MIXTRAL = (
    "a LoRA on 8 of 8 linear layers, 10% of the parameters; none on the bare parameters of "
    "2 MixtralExperts (59%), 2 MixtralTopKRouter (under 1%)"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Mixtral: most of it are experts."""
    sizes = {"vocab_size": 300, "tie_word_embeddings": False, "pad_token_id": 0}
    config = AutoConfig.for_model("mixtral", **ARCHITECTURES["mixtral"] | sizes)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path / "model")
    # Slots are the server's.
    monkeypatch.setattr(stage_module, "gpu_slot", contextlib.nullcontext)
    return tmp_path / "model"


def checked(folder: Path, **given: Any) -> Any:
    config = resolve({"base": {"model": str(folder)}, **given}).model_dump(mode="json")
    return base_model.fn(config, "LaMP-2M", {})


def test_experts_are_named_in_every_run(
    where: Store, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the one that checks the model, and in one that finds it, which counts nothing again."""
    stacked = {"target_modules": ["q_proj", "v_proj"]}
    methods = ["base", "mta", "oppu"]
    first = checked(folder, methods=methods, stacking=stacked)
    monkeypatch.delattr("tasks.lora.base.without_weights")
    again = checked(folder, methods=methods, stacking=stacked)
    assert (first.name, again.name) == ("Completed", "Cached")
    lines = result(first)["notes"]["adapted"]
    # q [32, 32] and v [16, 32] of two layers: 3072 of 62,624 parameters.
    assert lines == [
        f"meta_lora, oppu: {MIXTRAL}",
        f"stacking: {MIXTRAL.replace('8 of 8', '4 of 8').replace('10%', '5%')}",
    ]
    assert result(again)["notes"]["adapted"] == lines
    assert capsys.readouterr().out.splitlines() == lines * 2
    assert result(first)["value"] == result(again)["value"]


def test_only_loras_of_the_run_are_told_of(where: Store, folder: Path) -> None:
    assert result(checked(folder, methods=["base"]))["notes"]["adapted"] == []
    (line,) = result(checked(folder, methods=["merge_only"]))["notes"]["adapted"]
    assert line == f"meta_lora: {MIXTRAL}"


def test_a_layer_that_is_not_there_is_one_line(where: Store, folder: Path) -> None:
    state = checked(folder, methods=["oppu"], oppu={"target_modules": ["query"]})
    assert state.is_failed()
    assert "no linear layer of the model is so named" in state.message


def test_the_note_is_one_line_for_all_tasks() -> None:
    def cell(lamp_task: str, *lines: str) -> dict[str, Any]:
        return {"lamp_task": lamp_task, "base": {"notes": {"adapted": list(lines)}}}

    same = [cell("LaMP-2M", "oppu: a"), cell("LaMP-3", "oppu: a"), cell("LaMP-2M", "oppu: a")]
    assert adapted_notes(same) == ["oppu: a"]
    other = [*same, cell("LaMP-3", "oppu: b")]
    assert adapted_notes(other) == ["oppu: a", "LaMP-3: oppu: b"]


def test_the_default_dtype_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the whole process's, where other jobs train; a model's config may ask for another."""
    config = AutoConfig.from_pretrained(folder)
    config.dtype = torch.bfloat16
    asked: list[torch.dtype] = []
    monkeypatch.setattr(torch, "set_default_dtype", asked.append)
    without_weights(config)
    assert set(asked) <= {torch.float32}

"""What the LoRAs of a run are on, as the run says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.base_model import base_model, coverage_lines
from tasks.config.run import resolve
from tasks.errors import InputError
from tasks.lora.base import without_weights
from tasks.lora.tiny import train_tokenizer
from tasks.report.notes import coverage_notes
from tasks.results.run import Cell
from tests.unit.lora.helpers import TEXTS
from tests.unit.lora.test_architectures import ARCHITECTURES
from tests.unit.stages.answered import prepared

pytestmark = pytest.mark.usefixtures("where")

# As counted by hand in tests/unit/lora/test_coverage.py.
MIXTRAL = (
    "a LoRA on 8 of 8 linear layers, 10% of the parameters; none on the bare parameters of "
    "2 MixtralExperts (59%), 2 MixtralTopKRouter (under 1%)"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Mixtral: most of it are experts."""
    sizes = {"vocab_size": 300, "tie_word_embeddings": False, "pad_token_id": 0}
    config = AutoConfig.for_model("mixtral", **ARCHITECTURES["mixtral"] | sizes)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def lines_of(folder: Path, **given: Any) -> list[str]:
    config = resolve({"base": {"model": str(folder)}, **given}).for_task("LaMP-2M", 0)
    base = base_model(config, prepared("LaMP-2M", {"u": "g"}))
    return list(coverage_lines(config, base))


def test_experts_are_named_in_every_run(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first, and in one that counts nothing again."""
    stacked = {"target_modules": ["q_proj", "v_proj"]}
    methods = ["base", "mta", "oppu"]
    lines = lines_of(folder, methods=methods, stacking=stacked)
    monkeypatch.delattr("tasks.lora.base.without_weights")
    again = lines_of(folder, methods=methods, stacking=stacked)
    # q [32, 32] and v [16, 32] of two layers: 3072 of 62,624 parameters.
    assert lines == [
        f"meta_lora, oppu: {MIXTRAL}",
        f"stacking: {MIXTRAL.replace('8 of 8', '4 of 8').replace('10%', '5%')}",
    ]
    assert again == lines
    assert capsys.readouterr().out.splitlines() == lines * 2


def test_only_loras_of_the_run_are_told_of(folder: Path) -> None:
    assert lines_of(folder, methods=["base"]) == []
    (line,) = lines_of(folder, methods=["merge_only"])
    assert line == f"meta_lora: {MIXTRAL}"


def test_a_layer_that_is_not_there_is_one_line(folder: Path) -> None:
    with pytest.raises(InputError, match="no linear layer of the model is so named") as caught:
        lines_of(folder, methods=["oppu"], oppu={"target_modules": ["query"]})
    assert "\n" not in str(caught.value)


def test_the_note_is_one_line_for_all_tasks() -> None:
    def cell(lamp_task: str, *lines: str) -> Cell:
        return Cell.model_construct(config=resolve({}).for_task(lamp_task, 0), coverage=lines)

    same = [cell("LaMP-2M", "oppu: a"), cell("LaMP-3", "oppu: a"), cell("LaMP-2M", "oppu: a")]
    assert coverage_notes(same) == ["oppu: a"]
    other = [*same, cell("LaMP-3", "oppu: b")]
    assert coverage_notes(other) == ["oppu: a", "LaMP-3: oppu: b"]


def test_the_default_dtype_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the whole process's, where other jobs train; a model's config may ask for another."""
    config = AutoConfig.from_pretrained(folder)
    config.dtype = torch.bfloat16
    asked: list[torch.dtype] = []
    monkeypatch.setattr(torch, "set_default_dtype", asked.append)
    without_weights(config)
    assert set(asked) <= {torch.float32}

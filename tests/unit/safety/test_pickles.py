"""A pickle is never loaded, whatever it is offered as."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.states import Completed

import flows.mta as flow_module
from tasks.base_model import given_model, identified
from tasks.config.options import ComputeOptions
from tasks.errors import InputError
from tasks.lamp.definitions import get_task
from tasks.lamp.formats import read_users
from tasks.lora.adapters import read_peft
from tasks.lora.base import load_base
from tasks.record import Result
from tasks.results.store import Store
from tasks.text.encoder import encoder_folder
from tests.unit.lora.helpers import tiny_base
from tests.unit.results.test_stage_keys import ARGUMENTS, stages

PROJECT = Path(flow_module.__file__).resolve().parents[1]
# Modules and functions that run code of what they load, or write what only such could load.
LOADERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FLAGS = {"trust_remote_code", "allow_pickle"}
CALLS = {"torch.load", "torch.save", "np.load", "np.save", "pl.deserialize"}
# Models of these are code; what they write has no pickle (tests/unit/stages/test_registry.py).
FROM_CODE = {"registry.py", "bank_model.py"}


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def bomb(tmp_path: Path) -> bytes:
    """A pickle; the test fails where anything has loaded it."""
    return pickle.dumps(Bomb(tmp_path / "exploded"))


@pytest.fixture(autouse=True)
def _not_loaded(tmp_path: Path) -> Any:
    yield
    assert not (tmp_path / "exploded").exists()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    base = tiny_base()
    folder = tmp_path / "model"
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


def test_the_bomb_works(bomb: bytes, tmp_path: Path) -> None:
    pickle.loads(bomb)
    (tmp_path / "exploded").unlink()


def test_a_pickled_model_is_refused(
    bomb: bytes, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(InputError, match=r"pickled ones \(pytorch_model\.bin\).*never read"):
        load_base(model, max_tokens=32)
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "store"))
    with pytest.raises(InputError, match=r"pytorch_model\.bin") as caught:
        given_model(identified(str(model)), ComputeOptions(device="cpu"))
    assert "\n" not in str(caught.value)


def test_a_pickle_beside_safetensors_is_left_alone(bomb: bytes, model: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin"):
        (model / name).write_bytes(bomb)
    assert load_base(model, max_tokens=32).max_tokens == 32


def test_an_adapter_is_no_model(model: Path) -> None:
    """transformers would follow it to the model it names, and load its weights, pickled or not."""
    (model / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "some/other"})
    )
    with pytest.raises(InputError, match="is an adapter"):
        load_base(model, max_tokens=32)


def test_a_models_own_code_is_not_run(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {
        "AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\n")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_base(model, max_tokens=32)


def test_a_pickled_adapter_is_refused(bomb: bytes, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    (tmp_path / "adapter_model.bin").write_bytes(bomb)
    with pytest.raises(InputError, match=r"not a readable PEFT folder.*never from a pickle"):
        read_peft(tmp_path)


def test_a_pickle_named_as_safetensors_is_refused(bomb: bytes, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes(bomb)
    with pytest.raises(InputError):
        load_base(model, max_tokens=32)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    (tmp_path / "adapter_model.safetensors").write_bytes(bomb)
    with pytest.raises(InputError, match="not a readable PEFT folder"):
        read_peft(tmp_path)


def test_a_pickle_in_an_encoder_is_refused(
    bomb: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tmp_path / "encoder"
    (encoder / "2_Dense").mkdir(parents=True)
    (encoder / "model.safetensors").write_bytes(b"")
    (encoder / "training_args.bin").write_bytes(bomb)
    (encoder / "openvino").mkdir()
    (encoder / "openvino" / "openvino_model.bin").write_bytes(b"")
    assert encoder_folder(str(encoder)) == encoder
    (encoder / "2_Dense" / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(InputError, match=r"2_Dense/pytorch_model\.bin: a pickle is not read"):
        encoder_folder(str(encoder))
    # Nor where another program fetched all of a hub's model.
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(encoder))
    with pytest.raises(InputError, match=r"2_Dense/pytorch_model\.bin: a pickle is not read"):
        encoder_folder("some/encoder")
    shutil.rmtree(encoder)


def test_a_pickle_as_data_is_refused(bomb: bytes, tmp_path: Path) -> None:
    file = tmp_path / "users.pkl"
    file.write_bytes(bomb)
    with pytest.raises(InputError):
        read_users(file, get_task("LaMP-2M"))


def test_prefect_keeps_results_as_json(where: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's default serializer is a pickle; the flow keeps none, each stage has JSON."""
    made: list[dict[str, Any]] = []

    def task(*_args: Any, **options: Any) -> Any:
        made.append(options)
        return lambda *_, **__: Completed(data=Result())

    monkeypatch.setattr("tasks.results.stage.Task", task)
    monkeypatch.setattr("tasks.results.stage.FlowRunContext", SimpleNamespace(get=object))
    everyone = stages()
    for name, one in everyone.items():
        one(*ARGUMENTS[name])
    assert len(made) == len(everyone) > 10
    assert {(one["persist_result"], one["result_serializer"]) for one in made} == {(True, "json")}
    assert flow_module.mta.persist_result is False


def test_the_source_loads_and_writes_no_pickle() -> None:
    found = []
    files = [
        file for part in ("flows", "tasks", "infra") for file in (PROJECT / part).rglob("*.py")
    ]
    assert len(files) > 80
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            elif isinstance(node, ast.keyword) and node.arg in (
                "trust_remote_code",
                "allow_pickle",
            ):
                names = [] if ast.unparse(node.value) == "False" else [node.arg]
            bad = {name for name in names if name in CALLS or name.split(".")[0] in LOADERS}
            bad |= {name for name in names if name in FLAGS}
            if file.name not in FROM_CODE:
                bad |= {name for name in names if name.startswith("mlflow.pyfunc")}
            found += [f"{file.relative_to(PROJECT)}:{name}" for name in sorted(bad)]
    assert found == []

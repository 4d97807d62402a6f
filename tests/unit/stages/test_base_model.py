"""A given base model: checked once, kept while it is wanted, and its part in cache keys."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, MambaConfig, MambaForCausalLM

from tasks import base_model as stage_module
from tasks.base_model import base_model, load, model_name, model_parts, prompt_parts
from tasks.config import RunConfig, resolve
from tasks.errors import InputError
from tasks.lora.base import Base, load_base
from tasks.plan.model import planned
from tasks.store.artifacts import Store
from tasks.store.pieces import digest
from tests.unit.lora.helpers import tiny_base
from tests.unit.stages.users import result


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = tiny_base()
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    # Slots are the server's.
    monkeypatch.setattr(stage_module, "gpu_slot", contextlib.nullcontext)
    return tmp_path / "model"


def given(folder: Path, **changes: Any) -> RunConfig:
    return resolve({"base": {"model": str(folder), "max_tokens": 64, **changes}})


def checked(folder: Path, **changes: Any) -> Any:
    return base_model.fn(given(folder, **changes).model_dump(mode="json"), "LaMP-2M", {})


def test_a_given_model_is_loaded_once_to_check_it(where: Store, folder: Path) -> None:
    value = result(checked(folder))["value"]
    parameters = sum(p.numel() for p in tiny_base().model.parameters())
    assert (value["model"], value["parameters"]) == ("llama", parameters)
    assert value["revision"] is None
    assert checked(folder).name == "Cached"
    (folder / "notes.log").write_text("of no matter")
    assert checked(folder).name == "Cached"


def test_a_model_that_lacks_weights_fails_here(where: Store, folder: Path) -> None:
    """At the first stage, in one line, not after the embedding of all users."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["lm_head.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    state = checked(folder)
    assert state.is_failed()
    assert "its weights lack lm_head.weight" in state.message
    weights.write_bytes(weights.read_bytes()[:100])
    state = checked(folder)
    assert state.is_failed()
    assert "cannot be loaded" in state.message
    assert "\n" not in state.message


def test_a_model_without_attention_fails_here(where: Store, folder: Path) -> None:
    """A Mamba loads as any other; its embedding would be the first to fail."""
    config = MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(folder)
    state = checked(folder)
    assert state.is_failed()
    assert "its architecture, mamba, has layers of the kind linear_attention; " in state.message
    assert "\n" not in state.message
    # A dry run says so, too.
    with pytest.raises(InputError, match="its architecture, mamba, "):
        planned(given(folder))


def test_an_encoder_fails_here(where: Store, folder: Path) -> None:
    """transformers loads a BERT as a language model; it would see the answers that follow."""
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=128,
    )  # fmt: skip
    BertLMHeadModel(config).save_pretrained(folder)
    state = checked(folder)
    assert state.is_failed()
    assert "base.model: bert reads a text in both directions" in state.message
    assert "\n" not in state.message


def test_a_model_damaged_while_it_was_loaded_is_not_kept(
    where: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(out: Path) -> dict[str, Any]:
        shutil.copytree(folder, out / "model")
        return {}

    piece = where.get("base_model", digest("tiny"), trained)
    weights = piece.folder / "model" / "model.safetensors"
    base = {"ref": piece.ref, "value": piece.value}

    def too_late(*args: Any, **kwargs: Any) -> Base:
        weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
        return load_base(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("tasks.lora.base.load_base", too_late)
        with pytest.raises(InputError, match="damaged or removed while it was read"):
            load(resolve({}), where, base)
    again = Store(where.root).get("base_model", digest("tiny"), trained)
    right = load(resolve({}), Store(where.root), {"ref": again.ref, "value": again.value})
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(right.model.state_dict()[name], tensor), name


def other_weights(folder: Path) -> None:
    """Another model of the same size and times, as only its bytes tell."""
    weights = folder / "model.safetensors"
    stat = weights.stat()
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x3c")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_another_model_at_the_same_place_is_not_loaded(
    where: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed since the stage that hashed it, or another one on the machine of this job: what the
    store remembers of the place is of the other machine."""
    base = result(checked(folder))
    weights = folder / "model.safetensors"
    own = weights.read_bytes()
    assert own[-1:] != b"\x3c"
    other_weights(folder)
    line = (
        f"base.model {folder}: {folder} on {socket.gethostname()} is not the model that this run "
        "began with; give every machine the same files and start the run again"
    )
    stage_module.unload()
    with monkeypatch.context() as patch:
        patch.setattr("tasks.store.artifacts.host", lambda: "another-machine")
        with pytest.raises(InputError) as caught:
            load(given(folder), where, base)
    assert str(caught.value) == line
    os.utime(weights)
    with pytest.raises(InputError) as caught:
        load(given(folder), where, base)
    assert str(caught.value) == line
    weights.write_bytes(own)
    load(given(folder), where, base)


def test_a_given_model_that_changes_while_it_is_loaded_is_not_kept(
    where: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = result(checked(folder))

    def changed(*args: Any, **kwargs: Any) -> Base:
        other_weights(folder)
        os.utime(folder / "model.safetensors")
        return load_base(*args, **kwargs)

    stage_module.unload()
    monkeypatch.setattr("tasks.lora.base.load_base", changed)
    with pytest.raises(InputError, match="is not the model that this run began with"):
        load(given(folder), where, base)
    assert stage_module._LOADED.base is None


def test_a_given_model_is_hashed_once(
    where: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = result(checked(folder))

    def read(_path: Path) -> str:
        raise AssertionError("read again")

    monkeypatch.setattr("tasks.store.artifacts.file_sha256", read)
    for _ in range(3):
        stage_module.unload()
        load(given(folder), where, base)


def test_the_last_model_is_kept_per_thread(where: Store, folder: Path) -> None:
    options, base = given(folder), result(checked(folder))
    first = load(options, where, base)
    assert load(options, where, base) is first
    # Options that are not the base model's are no other model; the dtype is.
    other_training = resolve(options.model_dump(mode="json") | {"seed": 5})
    assert load(other_training, where, base) is first
    wide = load(given(folder, dtype="bfloat16"), where, base)
    assert wide.model.dtype == torch.bfloat16
    assert load(options, where, base) is not first
    others: list[Any] = []
    thread = threading.Thread(target=lambda: others.append(load(options, where, base)))
    thread.start()
    thread.join(60)
    assert others[0] is not load(options, where, base)


def test_cache_keys(where: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is the device and dtype it stands for; what is not read is no part."""
    base = {"ref": {"sha256": "s"}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    auto = model_parts(given(folder), base)
    assert (auto["device"], auto["dtype"], auto["base"]) == ("cpu", "float32", "s")
    assert auto == model_parts(given(folder, dtype="float32"), base)
    assert auto == model_parts(resolve(given(folder).model_dump(mode="json") | {"seed": 9}), base)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = model_parts(given(folder), base)
    assert (found["device"], found["dtype"]) == ("cuda", "bfloat16")

    def prompt(**changes: Any) -> dict[str, Any]:
        return prompt_parts(resolve({"prompt": changes}), "the instruction")

    # Four bits answer, and train nothing; the library that makes them is part of it.
    monkeypatch.setattr(stage_module, "library_versions", lambda names: dict.fromkeys(names, 1))
    four = given(folder, quantisation="nf4")
    assert model_parts(four, base) == model_parts(given(folder), base)
    assert model_parts(given(folder), base, answering=True) == model_parts(given(folder), base)
    assert model_parts(four, base, answering=True)["quantisation"] == ["nf4", {"bitsandbytes": 1}]

    # The tiny model has no chat template to leave unused.
    assert prompt() == prompt(chat="never")
    with_model = resolve({"base": {"model": "some/hub-id"}, "prompt": {"chat": "never"}})
    assert prompt_parts(with_model, "")["prompt"]["chat"] == "never"
    assert "instruction" not in prompt(style="compact")
    assert prompt(style="published")["instruction"] == "the instruction"
    assert "retrieval" not in prompt(history_items=0)
    # By value: results made before there were other indexes are found.
    assert prompt() == {"prompt": {"style": "compact", "history_items": 0}}
    one = {"prompt": {"style": "compact", "history_items": 1}, "retrieval": 2}
    assert prompt(history_items=1) == one
    assert prompt(history_index="published") == prompt()
    assert prompt(history_items=1, history_index="published") == one | {
        "retrieval": [2, "published"]
    }


def test_four_bits_are_refused_before_anything_is_trained(
    where: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("tasks.lora.base.version", missing)
    state = checked(folder, quantisation="nf4")
    assert state.is_failed()
    assert state.message.startswith("base.quantisation: nf4 needs the extra `nf4`")


def test_chat_never_reaches_the_model(where: Store, folder: Path) -> None:
    """Loaded anew: what the last job had is another way to ask."""
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    base = result(checked(folder))
    asked = load(given(folder), where, base)
    never = resolve(given(folder).model_dump(mode="json") | {"prompt": {"chat": "never"}})
    plain = load(never, where, base)
    assert (bool(asked.tokenizer.chat_template), plain.tokenizer.chat_template) == (True, None)


def test_the_models_name_is_never_a_path(folder: Path) -> None:
    assert model_name(given(folder)) == "model"
    assert model_name(given(folder / "..")) == folder.parent.name
    assert model_name(resolve({"base": {"model": "some/hub-id"}})) == "some/hub-id"

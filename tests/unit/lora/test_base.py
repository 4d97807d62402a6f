"""Loading a base model: whole or not at all, without dropout, greedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from tasks.errors import InputError
from tasks.lora.answer import answer_users, log_likelihoods
from tasks.lora.base import load_base, nf4
from tasks.lora.batches import Encoded, encode
from tasks.lora.grouped import grouped
from tasks.lora.tiny import train_tokenizer
from tasks.lora.train import epochs, fit
from tests import llama3
from tests.unit.lora.helpers import (
    TEXTS,
    linear_shapes,
    random_lora,
    sample,
    stacked,
    tiny_base,
    training,
)
from tests.unit.lora.peft_reference import by_hand

QUESTIONS = [Encoded(sample(seed, 4 + 3 * seed, 1).prompt, []) for seed in range(4)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tiny_base()
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def refused(folder: Path, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_base(folder, max_tokens=32, device="cpu")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_checkpoint_that_lacks_weights(folder: Path, name: str) -> None:
    """transformers would fill them with random numbers and a warning."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors[name]
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(folder, f"its weights lack {name}")


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    """With tied embeddings the head is not in the file, and nothing is missing."""
    base = tiny_base(tie_word_embeddings=True)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_base(tmp_path, max_tokens=32, device="cpu").model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": cut,
    "header cut": lambda file: file.write_bytes(file.read_bytes()[:20]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_weights_file(folder: Path, damage: str) -> None:
    DAMAGES[damage](folder / "model.safetensors")
    refused(folder, "cannot be loaded")


def test_sizes_that_do_not_fit_the_config(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 64}))
    refused(folder, "cannot be loaded")


def gpt2(folder: Path, pdrop: float) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=128,
        resid_pdrop=pdrop,
        embd_pdrop=pdrop,
        attn_pdrop=pdrop,
        summary_first_dropout=pdrop,
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def trained(folder: Path, global_seed: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    base = load_base(folder, max_tokens=32, device="cpu")
    base.model.requires_grad_(True)
    torch.manual_seed(global_seed)
    samples = [sample(seed, 9, 3) for seed in range(6)]
    steps = list(epochs(len(samples), training(), 3))
    run = fit(base, list(base.model.parameters()), samples, steps, training())
    return base.model.state_dict(), run.losses


def test_dropout_is_zero(tmp_path: Path) -> None:
    """Two trainings of a GPT-2 that asks for dropout 0.1: the same bits, those without dropout."""
    gpt2(tmp_path / "with", 0.1)
    gpt2(tmp_path / "without", 0.0)
    assert json.loads((tmp_path / "with" / "config.json").read_text())["resid_pdrop"] == 0.1
    first, losses = trained(tmp_path / "with", 1)
    for folder, seed in (("with", 2), ("without", 3)):
        again, same_losses = trained(tmp_path / folder, seed)
        assert losses == same_losses
        assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_llamas_attention_dropout_is_zero(tmp_path: Path) -> None:
    base = tiny_base(attention_dropout=0.2)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    assert trained(tmp_path, 1)[1] == trained(tmp_path, 2)[1]


LEFTOVERS: list[dict[str, Any]] = [
    {"min_new_tokens": 9, "min_length": 40},
    {"return_dict_in_generate": True, "output_scores": True},
    {"no_repeat_ngram_size": 1},
    {"repetition_penalty": 5.0},
    {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.5},
    {"num_beams": 3, "length_penalty": 5.0},
    {"max_length": 3},
    {"suppress_tokens": list(range(3, 200)), "bad_words_ids": [[7]]},
    {"forced_eos_token_id": 5, "begin_suppress_tokens": [8]},
]


@pytest.mark.parametrize("leftovers", LEFTOVERS, ids=lambda given: next(iter(given)))
def test_a_checkpoints_wishes_are_not_heard(folder: Path, leftovers: dict[str, Any]) -> None:
    """Against argmax by hand without a cache, whatever generation_config.json says."""
    given = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, **leftovers}
    (folder / "generation_config.json").write_text(json.dumps(given))
    base = load_base(folder, max_tokens=64, device="cpu")
    assert not base.model.generation_config.do_sample
    got = answer_users(base, {}, [QUESTIONS], lambda _users: (None, None), 12)
    assert got == [
        [
            base.tokenizer.decode(
                by_hand(base.model, item.prompt, 12), skip_special_tokens=True
            ).strip()
            for item in QUESTIONS
        ]
    ]


@pytest.mark.parametrize(
    ("given", "ends"), [(None, [2]), (5, [2, 5]), ([7, 5], [2, 5, 7]), ([2], [2])]
)
def test_where_a_turn_ends(folder: Path, given: Any, ends: list[int]) -> None:
    """The checkpoint's own ends of a turn, and the tokenizer's, which answers are trained with."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": given}))
    loaded = load_base(folder, max_tokens=64, device="cpu").model.generation_config
    assert loaded.eos_token_id == ends
    assert (loaded.pad_token_id, loaded.bos_token_id) == (0, 1)


def test_the_end_of_a_turn_ends_an_answer(tmp_path: Path) -> None:
    """Llama 3's two ends, and the template's one is what answers are trained with."""
    base = load_base(llama3.write_model(tmp_path, TEXTS), max_tokens=64, device="cpu")
    assert base.end_of_answer == base.tokenizer.convert_tokens_to_ids(llama3.END_OF_TURN) == 4
    assert base.model.generation_config.eos_token_id == [1, 4]
    assert not base.model.generation_config.do_sample


def test_chat_never(tmp_path: Path) -> None:
    """The same folder as a plain language model: no turns, and the end of text after an answer."""
    folder = llama3.write_model(tmp_path, TEXTS)
    base = load_base(folder, max_tokens=64, device="cpu", chat="never")
    encoded = encode(base, "a ship", "comedy")
    assert base.tokenizer.decode(encoded.prompt) == "<|begin_of_text|>a ship"
    assert base.tokenizer.decode(encoded.answer) == " comedy<|end_of_text|>"


def test_four_bits_need_their_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.lora.base.find_spec", lambda _name: None)
    with pytest.raises(
        InputError, match=r"^base.quantisation: nf4 needs the extra `nf4`"
    ) as caught:
        load_base(folder, max_tokens=32, device="cpu", quantisation="nf4")
    assert "\n" not in str(caught.value)


def test_how_four_bits_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the published evaluation: NF4, computed in bfloat16, without double quantisation."""
    monkeypatch.setattr("tasks.lora.base.find_spec", lambda _name: True)
    given = nf4(torch.device("cpu"))
    config = given["quantization_config"]
    assert (config.load_in_4bit, config.load_in_8bit) == (True, False)
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert not config.bnb_4bit_use_double_quant
    assert given["device_map"] == {"": torch.device("cpu")}


def test_answers_of_a_base_in_four_bits(tmp_path: Path) -> None:
    """With bitsandbytes itself: linear layers in 4 bits, users' LoRAs on top as they are.

    The reference is the dequantised model, its weights written back as ordinary ones.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `nf4` is not installed")
    # bitsandbytes wants whole blocks of 64 numbers on a CPU.
    folder, tiny = tmp_path, tiny_base(hidden_size=64, intermediate_size=128)
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    base = load_base(folder, max_tokens=64, device="cpu", quantisation="nf4")
    names = [
        name
        for name, layer in base.model.named_modules()
        if isinstance(layer, bitsandbytes.nn.Linear4bit)
    ]
    plain = load_base(folder, max_tokens=64, device="cpu")
    shapes = linear_shapes(plain.model)
    assert sorted(names) == sorted(shapes)
    with torch.no_grad():
        for name in names:
            weight = base.model.get_submodule(name).weight
            wide = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            error = (wide - plain.model.get_submodule(name).weight).abs().mean()
            assert 0 < error < 0.05  # 16 levels for weights of deviation 0.2
            plain.model.get_submodule(name).weight.copy_(wide)
    lora = random_lora(shapes, 2, 0.5, seed=0)
    samples = [sample(seed, 12, 4) for seed in range(3)]
    found = {}
    for key, model in (("nf4", base), ("plain", plain)):
        with grouped(model.model, names) as layers:
            parts = (stacked([lora]), None)
            (found[key],) = log_likelihoods(model, layers, [samples], lambda _u, p=parts: p)
    # bfloat16 inside the layers: 8 bits of precision.
    assert torch.allclose(found["nf4"], found["plain"], rtol=0.05, atol=0.05)


def test_max_tokens_leave_room_for_an_answer(folder: Path) -> None:
    """256 positions less 64 for an answer."""
    assert load_base(folder, max_tokens=1000, device="cpu").max_tokens == 192
    assert load_base(folder, max_tokens=100, device="cpu").max_tokens == 100


def test_out_of_memory_is_not_bad_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def full(*_a: Any, **_k: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_base(folder, max_tokens=8, device="cpu")

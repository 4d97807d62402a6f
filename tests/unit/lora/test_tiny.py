"""The tiny base model and its tokenizer, and loading base models."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tasks.errors import InputError
from tasks.lora.answer import answer_users
from tasks.lora.base import load_base, pick_adapter_dtype, pick_device, pick_dtype
from tasks.lora.batches import encode
from tasks.lora.tiny import batches, train_tiny, train_tokenizer
from tasks.lora.train import Trained
from tests.unit.lora.helpers import TEXTS, tiny_base

QUESTIONS = [(f"{first} {second}:", tag) for first in ("red", "blue") for second, tag in
             (("ship", "comedy"), ("farm", "classic"), ("robot", "sci-fi"))]  # fmt: skip


def train(folder: Path, seed: int, steps: int = 6) -> Trained:
    return train_tiny(
        folder,
        QUESTIONS,
        hidden=32,
        layers=2,
        heads=2,
        steps=steps,
        batch_size=4,
        learning_rate=1e-2,
        vocabulary=300,
        max_tokens=32,
        seed=seed,
        device=torch.device("cpu"),
    )


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first = train(tmp_path / "a", seed=1)
    torch.manual_seed(99)
    second = train(tmp_path / "b", seed=1)
    other = train(tmp_path / "c", seed=2)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert first == second != other
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(first.losses) == 6


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    train(tmp_path, seed=1, steps=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_it_learns_and_loads(tmp_path: Path) -> None:
    """Six questions by heart in 150 steps; the saved folder answers them all."""
    trained = train(tmp_path, seed=0, steps=150)
    assert trained.losses[-1] < 0.05 < trained.losses[0]
    base = load_base(tmp_path, max_tokens=32, device="cpu")
    samples = [encode(base, prompt, None) for prompt, _ in QUESTIONS]
    got = answer_users(base, {}, [samples], lambda _users: (None, None), 8)
    assert got == [[tag for _, tag in QUESTIONS]]
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def tokenizers(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """As trained, and as it comes back from its folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.save_pretrained(folder)
    return tokenizer, AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(codec="utf-8"), max_size=60))
@example("don ' t  stop , now .\r\n\t n't ?")
@example("ﬁ é e\u0301 \u200b\ufeff \U0001f9d1\u200d\U0001f680 \x00")
@example("a </s> b <s><pad>")
def test_any_text_comes_back(
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast], text: str
) -> None:
    """Byte-level: decode(encode(x)) == x, and saving changes nothing."""
    trained, loaded = tokenizers
    ids = trained(text)["input_ids"]
    assert trained.decode(ids) == text
    assert loaded(text)["input_ids"] == ids
    assert loaded.decode(ids) == text


def test_tokenizer_has_every_byte_and_three_special_tokens() -> None:
    tokenizer = train_tokenizer([], 32)
    assert len(tokenizer) == 256 + 3
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert len(train_tokenizer(TEXTS, 300)) == 300


def test_load_base_names_what_is_wrong(tmp_path: Path) -> None:
    saved = tiny_base()
    for name in ("no model", "no end", "pickled"):
        saved.tokenizer.save_pretrained(tmp_path / name)
        if name != "no model":
            saved.model.save_pretrained(tmp_path / name)
    config = tmp_path / "no end" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": None}))
    weights = tmp_path / "pickled" / "model.safetensors"
    weights.unlink()
    torch.save(saved.model.state_dict(), weights.with_name("pytorch_model.bin"))
    for name, words in (
        ("no model", r"needs \*\.safetensors weights and has none"),
        ("absent", r"needs \*\.safetensors weights and has none"),
        ("no end", "no end-of-text token"),
        ("pickled", r"needs \*\.safetensors weights and has only pickled"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            load_base(tmp_path / name, max_tokens=8, device="cpu")
        assert "\n" not in str(caught.value)


def test_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("auto", gpu) == torch.bfloat16
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    assert pick_dtype("float32", gpu) == torch.float32
    narrow, wide = torch.bfloat16, torch.float32
    assert pick_adapter_dtype("auto", gpu, narrow) == narrow
    assert pick_adapter_dtype("auto", gpu, wide) is None
    assert pick_adapter_dtype("auto", cpu, narrow) is None
    assert pick_adapter_dtype("bfloat16", cpu, wide) == narrow
    assert pick_adapter_dtype("float32", gpu, narrow) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == cpu
    with pytest.raises(InputError, match=r"compute\.device"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == gpu


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    steps=st.integers(1, 40),
    size=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_batches(lengths: list[int], steps: int, size: int, seed: int) -> None:
    """As many as asked, all full; every sample as often as any other, or once more."""
    found = batches(lengths, steps, size, seed)
    assert [len(batch) for batch in found] == [size] * steps
    times = Counter(index for batch in found for index in batch)
    counts = [times[index] for index in range(len(lengths))]
    assert max(counts) - min(counts) <= 1
    assert found == batches(lengths, steps, size, seed)


def test_batches_hold_like_lengths() -> None:
    """Two lengths, half each, in one window: no batch but one can hold both."""
    lengths = [10] * 64 + [30] * 64
    mixed = [batch for batch in batches(lengths, 16, 8, 0) if len({lengths[i] for i in batch}) > 1]
    assert len(mixed) <= 1
    order = [lengths[batch[0]] for batch in batches(lengths, 16, 8, 0)]
    assert order != sorted(order)

"""Users embedded by the base model's own hidden states (`anchors.text_model: base`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.embed import read_embeddings
from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.signature import mean_states
from tasks.results.models import Embedded
from tasks.results.store import store
from tests.unit.lora.helpers import HIDDEN, sample, tiny_base
from tests.unit.stages.pipeline import (
    ONE_MORE_ITEM,
    ROLES,
    embedded_for,
    merging,
    noted,
    stage_keys,
)

LENGTHS = (3, 17, 5, 1, 40, 17)


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base()


def alone(model: Any, ids: list[int]) -> torch.Tensor:
    """The mean of transformers' last hidden states of one text, unpadded."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return output.hidden_states[-1][0].mean(0)


@pytest.mark.parametrize("positions", [1, 60, 16_384])
def test_states_are_those_of_each_text_alone(base: Base, positions: int) -> None:
    """Texts of other lengths in the batch change nothing, whatever the batches are."""
    texts = [Encoded(sample(n, length, 1).prompt, []) for n, length in enumerate(LENGTHS)]
    got = mean_states(base, texts, positions)
    assert (got.shape, got.dtype) == ((len(LENGTHS), HIDDEN), torch.float32)
    for row, text in zip(got, texts, strict=True):
        torch.testing.assert_close(row, alone(base.model, text.prompt), rtol=1e-5, atol=1e-5)
    assert torch.cdist(got, got).add(torch.eye(len(got)) * 9).min() > 0.1


def embedded(place: Path, roles: dict[str, Any], **base: Any) -> Embedded:
    anchors = {"embedding": "text", "text_model": "base", "min_items": 1}
    return merging(place, roles, anchors=anchors, base=base).embedded


def vectors(found: Embedded) -> dict[str, list[float]]:
    table = pl.read_parquet(store().path(found.table))
    return dict(zip(table["user_id"], table["vector"].to_list(), strict=True))


@pytest.mark.parametrize("most", [64, 8])
def test_a_user_is_the_mean_over_items(place: Path, most: int) -> None:
    """docs/method.md, stage 1: mean over an item's tokens, then over items, cut at so many tokens.

    By stock transformers, one item at a time; "few-1 film number 2 comedy" has more than 8 tokens.
    """
    found = vectors(embedded(place, ROLES, max_tokens=most))
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    users = [*ROLES["anchor"], *ROLES["few_shot"]]
    assert list(found) == [one["user_id"] for one in users]
    for one in users:
        texts = [f"{item['description']} {item['tag']}" for item in one["profile"]]
        ids = [tokenizer(text)["input_ids"] for text in texts]
        assert min(map(len, ids)) > 8
        wanted = torch.stack([alone(model, own[:most]) for own in ids]).mean(0)
        np.testing.assert_allclose(found[one["user_id"]], wanted, rtol=1e-4, atol=1e-5)


def test_one_users_new_item_is_one_users_work(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stage_keys() as keys:
        first = embedded(place, ROLES)
        embedded(place, ROLES)
        assert len(set(keys["embed"])) == 1
        asked = noted(monkeypatch, "tasks.embed._vectors", embedded_for)
        changed = embedded(place, ONE_MORE_ITEM)
    assert asked == [["few-0"]]
    assert len(set(keys["embed"])) == 2
    before, after = vectors(first), vectors(changed)
    assert [name for name in before if before[name] != after[name]] == ["few-0"]
    # Texts are scaled, not centred (`test_embedding`).
    units = read_embeddings(first)
    raw = np.array([before[name] for name in units["few_shot"][0]])
    np.testing.assert_allclose(
        units["few_shot"][1], raw / np.linalg.norm(raw, axis=1, keepdims=True), rtol=1e-6
    )

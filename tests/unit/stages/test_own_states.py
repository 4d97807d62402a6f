"""Users embedded by the base model's own hidden states (`anchors.text_model: base`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tasks.embedding as embedding
from tasks.base_model import base_model
from tasks.config import resolve
from tasks.lora.base import Base
from tasks.lora.batches import Encoded
from tasks.lora.signature import mean_states
from tasks.prepare import prepare
from tasks.stage import store
from tasks.store.artifacts import Store
from tests.unit.lora.helpers import HIDDEN, sample, tiny_base
from tests.unit.stages.pipeline import ONE_MORE_ITEM, ROLES
from tests.unit.stages.users import result, write_users

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


def embedded(place: Path, roles: dict[str, Any], **base_options: Any) -> tuple[Any, Any]:
    """The state of the stage, and the configuration."""
    data = write_users(place / "data", **roles)
    settings = {
        "data": str(data),
        "base": {"model": str(place / "model"), "max_tokens": 64} | base_options,
        "anchors": {"embedding": "text", "text_model": "base", "min_items": 1},
    }
    config = resolve(settings).model_dump(mode="json")
    prepared = result(prepare.fn(config, "LaMP-2M"))
    base = result(base_model.fn(config, "LaMP-2M", prepared))
    return embedding.embed.fn(config, "LaMP-2M", prepared, base), config


def vectors(where: Store, state: Any) -> dict[str, list[float]]:
    table = pl.read_parquet(where.open(result(state)["ref"]).folder / "embeddings.parquet")
    return dict(zip(table["user_id"], table["vector"].to_list(), strict=True))


@pytest.mark.parametrize("most", [64, 8])
def test_a_user_is_the_mean_over_items(place: Path, most: int) -> None:
    """METHOD, stage 1: mean over an item's tokens, then over items, cut at so many tokens.

    By stock transformers, one item at a time; "few-1 film number 2 comedy" has more than 8 tokens.
    """
    state, _ = embedded(place, ROLES, max_tokens=most)
    found = vectors(store(), state)
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


def test_one_users_new_item_is_one_users_work(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = embedded(place, ROLES)
    again, config = embedded(place, ROLES)
    assert again.name == "Cached"
    capsys.readouterr()
    changed, _ = embedded(place, ONE_MORE_ITEM)
    assert "embedding 1 users, 6 known" in capsys.readouterr().out
    before, after = vectors(store(), first), vectors(store(), changed)
    assert [name for name in before if before[name] != after[name]] == ["few-0"]
    # Texts are scaled, not centred (`test_embedding`).
    units = embedding.read_embeddings(store(), result(first)["ref"], resolve(config))
    raw = np.array([before[name] for name in units["few_shot"][0]])
    np.testing.assert_allclose(
        units["few_shot"][1], raw / np.linalg.norm(raw, axis=1, keepdims=True), rtol=1e-6
    )

"""Vectors that are whitened, in the stage that embeds users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tasks.embed import read_embeddings, read_whitening
from tasks.method.whitening import whitening
from tasks.results.models import Embedded
from tasks.results.store import store
from tests.unit.stages.pipeline import (
    ONE_MORE_ITEM,
    ROLES,
    embedded_for,
    merging,
    noted,
    stage_keys,
)
from tests.unit.stages.users import user


def embedded(place: Path, roles: dict[str, Any]) -> Embedded:
    anchors = {
        "embedding": "input_signature",
        "signature_vocabulary": 8,
        "signature_hidden": 4,
        "min_items": 1,
    }
    return merging(place, roles, anchors=anchors).embedded


def table(found: Embedded) -> dict[str, np.ndarray]:
    frame = pl.read_parquet(store().path(found.table))
    vectors = [np.array(vector, np.float64) for vector in frame["vector"].to_list()]
    return dict(zip(frame["user_id"], vectors, strict=True))


def matrix_of(found: Embedded) -> np.ndarray:
    assert found.whitening is not None
    return read_whitening(found.whitening)


def test_vectors_are_centred_whitened_and_of_unit_length(place: Path) -> None:
    found = embedded(place, ROLES)
    rows = table(found)
    assert set(rows) == {one["user_id"] for own in ROLES.values() for one in own}
    matrix = matrix_of(found)
    assert matrix.shape == (32, 32)
    assert not np.allclose(matrix, np.eye(32))
    centre = np.mean([rows["base-1"], rows["base-2"]], axis=0)
    ids, vectors = read_embeddings(found)["few_shot"]
    for user_id, vector in zip(ids, vectors, strict=True):
        wanted = (rows[user_id] - centre) @ matrix
        np.testing.assert_allclose(vector, wanted / np.linalg.norm(wanted), rtol=1e-5, atol=1e-7)


def test_a_new_item_of_one_user_asks_nobody_else(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whitening is found, too, until a base user changes."""
    made: list[int] = []

    def counted(users: Any) -> np.ndarray:
        own = list(users)
        made.append(len(own))
        return whitening(own)

    with stage_keys() as keys:
        first = embedded(place, ROLES)
        monkeypatch.setattr("tasks.embed.whitening", counted)
        asked = noted(monkeypatch, "tasks.embed._vectors", embedded_for)
        embedded(place, ROLES)
        assert len(set(keys["embed"])) == 1
        changed = embedded(place, ONE_MORE_ITEM)
    assert asked == [["few-0"]]
    assert made == []
    before, after = table(first), table(changed)
    assert [name for name in before if not np.array_equal(before[name], after[name])] == ["few-0"]
    assert first.whitening is not None
    assert changed.whitening is not None
    assert first.whitening.sha256 == changed.whitening.sha256
    embedded(place, ROLES | {"base": [user("base-1", 4), *ROLES["base"][1:]]})
    assert made == [2]


def test_without_base_users_the_candidates_teach_it(place: Path) -> None:
    roles = {role: own for role, own in ROLES.items() if role != "base"}
    vectors = read_embeddings(embedded(place, roles))
    assert set(vectors["anchor"][0]) == {one["user_id"] for one in ROLES["anchor"]}
    assert np.isfinite(vectors["few_shot"][1]).all()

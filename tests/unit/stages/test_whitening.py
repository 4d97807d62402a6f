"""Whitening, by a population whose covariance is known, and in the stage that embeds users."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from threadpoolctl import threadpool_limits

from tasks import whitening as module
from tasks.base_model import base_model
from tasks.config import resolve
from tasks.embedding import embed, read_embeddings
from tasks.prepare import prepare
from tasks.stage import store
from tasks.whitening import FLOOR, WHITENING_FILE, read_whitening, whitening, write_whitening
from tests.unit.stages.pipeline import ONE_MORE_ITEM, ROLES, prepared_place
from tests.unit.stages.users import result, user, write_users


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with prepared_place(tmp_path_factory.mktemp("whitening")) as folder:
        yield folder


def test_within_user_variance_becomes_one() -> None:
    """Items of three users around means far apart; the means do not count.

    Covariance by numpy: deviations from the user's own mean, over 3 x 200 - 3 degrees of freedom.
    """
    generator = np.random.default_rng(0)
    mix = np.array([[3.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.5, 0.7]])
    users = [generator.normal(size=(200, 3)) @ mix.T + mean for mean in (0.0, 50.0, -80.0)]
    deviations = np.concatenate([own - own.mean(0) for own in users])
    covariance = deviations.T @ deviations / (600 - 3)
    matrix = whitening(users).astype(np.float64)
    floor = FLOOR * np.linalg.eigvalsh(covariance)[-1]
    wanted = np.linalg.eigvalsh(covariance)
    got = np.diag(matrix.T @ covariance @ matrix)
    np.testing.assert_allclose(np.sort(got), np.sort(wanted / (wanted + floor)), rtol=1e-4)
    # W W^T is the inverse of covariance and floor: distances are Mahalanobis'.
    inverse = np.linalg.inv(covariance + floor * np.eye(3))
    np.testing.assert_allclose(matrix @ matrix.T, inverse, rtol=1e-4, atol=1e-6)


def test_a_direction_without_variance_stays_bounded() -> None:
    """Variances 4 and 0: scales 1/sqrt(4 + .04) and 1/sqrt(.04) = 5."""
    users = [np.array([[2.0, 1.0], [-2.0, 1.0], [2.0, 1.0], [-2.0, 1.0], [0.0, 1.0]])]
    matrix = whitening(users)
    np.testing.assert_allclose(np.abs(np.array([1.0, 0.0]) @ matrix).max(), 4.04**-0.5, rtol=1e-5)
    np.testing.assert_allclose(np.abs(np.array([0.0, 1.0]) @ matrix).max(), 5.0, rtol=1e-5)


@pytest.mark.parametrize("items", [np.array([[1.0, 2.0]]), np.array([[1.0, 2.0], [1.0, 2.0]])])
def test_items_that_do_not_differ_leave_vectors_alone(items: np.ndarray) -> None:
    np.testing.assert_array_equal(whitening([items]), np.eye(2, dtype=np.float32))


def test_the_file_gives_it_back(tmp_path: Path) -> None:
    matrix = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)
    write_whitening(tmp_path / WHITENING_FILE, matrix.T)
    np.testing.assert_array_equal(read_whitening(tmp_path / WHITENING_FILE), matrix.T)


def embedded(place: Path, roles: dict[str, Any]) -> tuple[Any, Any]:
    """The state of the stage, and the configuration."""
    settings = {
        "data": str(write_users(place / "data", **roles)),
        "base": {"model": str(place / "model"), "max_tokens": 64},
        "anchors": {
            "embedding": "input_signature",
            "signature_vocabulary": 8,
            "signature_hidden": 4,
            "min_items": 1,
        },
    }
    options = resolve(settings)
    config = options.model_dump(mode="json")
    prepared = result(prepare.fn(config, "LaMP-2M"))
    base = result(base_model.fn(config, "LaMP-2M", prepared))
    return embed.fn(config, "LaMP-2M", prepared, base), options


def table(state: Any) -> dict[str, np.ndarray]:
    frame = pl.read_parquet(store().open(result(state)["ref"]).folder / "embeddings.parquet")
    vectors = [np.array(vector, np.float64) for vector in frame["vector"].to_list()]
    return dict(zip(frame["user_id"], vectors, strict=True))


def test_vectors_are_centred_whitened_and_of_unit_length(place: Path) -> None:
    state, options = embedded(place, ROLES)
    rows = table(state)
    assert set(rows) == {one["user_id"] for own in ROLES.values() for one in own}
    folder = store().open(result(state)["ref"]).folder
    matrix = read_whitening(folder / WHITENING_FILE)
    assert matrix.shape == (32, 32)
    assert not np.allclose(matrix, np.eye(32))
    centre = np.mean([rows["base-1"], rows["base-2"]], axis=0)
    ids, vectors = read_embeddings(store(), result(state)["ref"], options)["few_shot"]
    for user_id, vector in zip(ids, vectors, strict=True):
        wanted = (rows[user_id] - centre) @ matrix
        np.testing.assert_allclose(vector, wanted / np.linalg.norm(wanted), rtol=1e-5, atol=1e-7)


def test_a_new_item_of_one_user_asks_nobody_else(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whitening is found, too, until a base user changes."""
    first, _ = embedded(place, ROLES)
    made: list[int] = []

    def counted(users: Any) -> np.ndarray:
        own = list(users)
        made.append(len(own))
        return module.whitening(own)

    monkeypatch.setattr("tasks.embedding.whitening", counted)
    again, _ = embedded(place, ROLES)
    assert again.name == "Cached"
    capsys.readouterr()
    changed, _ = embedded(place, ONE_MORE_ITEM)
    assert "embedding 1 users, 8 known" in capsys.readouterr().out
    assert made == []
    before, after = table(first), table(changed)
    assert [name for name in before if not np.array_equal(before[name], after[name])] == ["few-0"]
    folders = [store().open(result(state)["ref"]).folder for state in (first, changed)]
    files = [(folder / WHITENING_FILE).read_bytes() for folder in folders]
    assert files[0] == files[1]
    embedded(place, ROLES | {"base": [user("base-1", 4), *ROLES["base"][1:]]})
    assert made == [2]


def test_without_base_users_the_candidates_teach_it(place: Path) -> None:
    roles = {role: own for role, own in ROLES.items() if role != "base"}
    state, options = embedded(place, roles)
    vectors = read_embeddings(store(), result(state)["ref"], options)
    assert set(vectors["anchor"][0]) == {one["user_id"] for one in ROLES["anchor"]}
    assert np.isfinite(vectors["few_shot"][1]).all()


@pytest.mark.skipif(os.cpu_count() == 1, reason="one core: there is nothing to tell apart")
def test_the_number_of_threads_changes_nothing() -> None:
    """Left to themselves, sums of 256 numbers a user come out otherwise on two threads."""
    generator = np.random.default_rng(0)
    users = [generator.normal(size=(12, 256)).astype(np.float32) for _ in range(60)]
    with threadpool_limits(1):
        one = whitening(users)
    with threadpool_limits(2):
        assert whitening(users).tobytes() == one.tobytes()

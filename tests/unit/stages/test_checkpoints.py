"""Stages whose training is killed and started again, against stages left alone; and when the
checkpoints go."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.answer import how_answered
from tasks.base_model import base_model
from tasks.config.options import ComputeOptions
from tasks.files import PARTIAL
from tasks.forget.user import forget
from tasks.lora.checkpoint import Checkpoint, Saved
from tasks.model import checkpoint
from tasks.prepare import prepared_users
from tasks.record import key_of
from tasks.results.models import Base
from tasks.results.store import CHECKPOINT_SECONDS, Store, store
from tasks.stacking import Batch, merged_and_trained
from tasks.text.questions import setting_of
from tasks.users import users_in_order
from tests.unit.stages import pipeline
from tests.unit.stages.pipeline import Killed, config_of, prepared_place, run, until_done

ADAPT = {"enabled": True, "rank": 2, "alpha": 2.0, "epochs": 2, "batch_size": 2, "accumulation": 1,
         "train_on": "profile"}  # fmt: skip
TINY = {"hidden": 16, "layers": 1, "heads": 2, "steps": 6, "batch_size": 4}
OFTEN = 1e-9


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "calm").mkdir()
    (tmp_path / "disturbed").mkdir()
    return tmp_path / "calm", tmp_path / "disturbed"


def test_every_stage_ends_with_the_same_results(
    places: tuple[Path, Path], kills: list[Path]
) -> None:
    """A model adapted to the task, three anchors, three users: five jobs, each killed once."""
    found = []
    for folder, seconds in zip(places, (0.0, OFTEN), strict=True):
        given: Any = {
            "base": {"task_adapt": ADAPT},
            "anchors": pipeline.OPTIONS["anchors"] | {"per_job": 1},
            "compute": {"checkpoint_seconds": seconds},
        }
        with prepared_place(folder):
            again = partial(run, folder, pipeline.ROLES)
            found.append(until_done(lambda again=again, given=given: again(**deepcopy(given))))
            assert kept(store()) == []
    assert sorted(path.parent.name for path in kills) == [
        "meta_lora", "meta_lora", "meta_lora", "stacking", "task_adapt",
    ]  # fmt: skip
    calm, disturbed = found
    for take in (
        lambda cell: cell.base.adapter,
        lambda cell: cell.merging("mta").merged.bank.file,
        lambda cell: cell.answers["mta"][0].stacked,
        lambda cell: cell.scored("mta").predictions,
    ):
        assert take(disturbed).sha256 == take(calm).sha256


def test_the_tiny_base(places: tuple[Path, Path], kills: list[Path]) -> None:
    found = []
    for folder, seconds in zip(places, (0.0, OFTEN), strict=True):
        with prepared_place(folder):
            found.append(until_done(partial(base_of, folder, seconds)))
            assert kept(store()) == []
    assert [path.parent.name for path in kills] == ["tiny_model"]
    assert key_of(found[0]) == key_of(found[1])


def base_of(folder: Path, seconds: float) -> Base:
    config = config_of(
        folder,
        pipeline.ROLES,
        base={"model": "tiny", "tiny": TINY},
        compute={"checkpoint_seconds": seconds},
    )
    return base_model(config, prepared_users(config))


# --- where they lie, and when they go -------------------------------------------------------------


@contextmanager
def job(stage: str, key: str, users: list[str], seconds: float = 60.0) -> Iterator[Checkpoint]:
    compute = ComputeOptions(checkpoint_seconds=seconds)
    with checkpoint(compute, stage, key, users) as made:
        assert made is not None
        yield made


def a_checkpoint(stage: str, key: str, users: list[str]) -> Path:
    """That of a job which was killed."""
    with suppress(Killed), job(stage, key, users) as made:
        made.save(Saved(1, {"x": torch.zeros(1)}, {}))
        raise Killed
    return made.path


def kept(where: Store) -> list[str]:
    return sorted(path.name for path in where.checkpoints.glob("*/*"))


def test_none_where_none_is_wanted(where: Store) -> None:
    with checkpoint(ComputeOptions(checkpoint_seconds=0), "stacking", "k", ["u"]) as made:
        assert made is None


def test_one_goes_when_its_job_ends_well(where: Store) -> None:
    left = a_checkpoint("stacking", "k", ["u"])
    assert kept(where) == [left.name]
    with job("stacking", "k", ["u"]) as made:
        saved = made.load()
        assert saved is not None
        assert saved.step == 1
        assert left.exists()
    assert kept(where) == []


def test_the_key_is_of_the_stage_and_the_job(where: Store) -> None:
    keys, paths = [], []
    # How often it is written changes no number.
    for stage, key, seconds in (
        ("stacking", "k", 60.0), ("stacking", "l", 60.0), ("meta_lora", "k", 60.0),
        ("stacking", "k", 5.0),
    ):  # fmt: skip
        with job(stage, key, ["u"], seconds) as made:
            keys.append(made.key)
            paths.append(made.path)
            assert made.about == {"stage": stage, "users": ["u"]}
    assert len(set(keys)) == len(set(paths)) == 3
    assert (keys[3], paths[3]) == (keys[0], paths[0])


def test_a_stacked_job_is_keyed_by_its_company(place: Path, kills: list[Path]) -> None:
    """Who are trained at once share a state: other users, or in another order, are another job."""
    config = config_of(
        place, pipeline.ROLES, methods=["stack_only"], compute={"checkpoint_seconds": OFTEN}
    )
    own, users = config.method("stack_only"), prepared_users(config)
    base = base_model(config, users)
    setting = setting_of(config, own, users, base)
    for names in (["few-0", "few-1"], ["few-1", "few-0"], ["few-0"]):
        few = users_in_order(users.few_shot, names)
        batch = Batch(few, how_answered(own), None, None, setting)
        with pytest.raises(Killed):
            merged_and_trained(batch)
    assert len(kills) == len(set(kills)) == 3
    assert {path.parent.name for path in kills} == {"stacking"}


def test_sweep_takes_what_nobody_resumes(where: Store) -> None:
    half = a_checkpoint("meta_lora", "job2", ["u"])
    fresh = a_checkpoint("stacking", "job3", ["u"])
    old = a_checkpoint("stacking", "job4", ["u"])
    damaged = fresh.with_name("job5.safetensors")
    damaged.write_bytes(b"damaged")
    # A month.
    assert CHECKPOINT_SECONDS == 30 * 24 * 3600
    for path, age in ((old, CHECKPOINT_SECONDS + 60), (fresh, CHECKPOINT_SECONDS - 60)):
        os.utime(path, times=(time.time() - age,) * 2)
    where.sweep()
    assert kept(where) == sorted([half.name, fresh.name, damaged.name])


def test_with_a_user_who_is_forgotten_all_go(
    place: Path, mlflow_tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be of the user, or go on from what goes: half-written and damaged ones, too."""
    mlflow = shutil.copy(mlflow_tables, place / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlflow}")
    prepared_users(config_of(place, pipeline.ROLES))
    own = a_checkpoint("stacking", "own", ["few-0", "few-1"])
    a_checkpoint("stacking", "other", ["few-0", "few-12"])
    a_checkpoint("meta_lora", "anchors", ["anchor-2"])
    (own.parent / "damaged.safetensors").write_bytes(b"whose?")
    (own.parent / f"{PARTIAL}elsewhere").write_bytes(b"whose?")
    _, left = forget(store(), "few-1")
    assert left == []
    assert kept(store()) == []

"""Stages whose training is killed and started again, against stages left alone; and whose files
the checkpoints are."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tasks import base_model as base_model_stage
from tasks.config import RunConfig, resolve
from tasks.forget.user import forget
from tasks.lora.checkpoint import Saved, about_of
from tasks.prepare import prepare
from tasks.stage import store
from tasks.store import checkpoints, processes
from tasks.store.artifacts import Store
from tasks.store.files import PARTIAL
from tests.unit.stages import pipeline
from tests.unit.stages.pipeline import Quiet, prepared_place, run, until_done
from tests.unit.stages.users import result, write_users

ADAPT = {"enabled": True, "rank": 2, "alpha": 2.0, "epochs": 2, "batch_size": 2, "accumulation": 1,
         "train_on": "profile"}  # fmt: skip
TINY = {"hidden": 16, "layers": 1, "heads": 2, "steps": 6, "batch_size": 4}
OFTEN = 1e-9


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "calm").mkdir()
    (tmp_path / "disturbed").mkdir()
    return tmp_path / "calm", tmp_path / "disturbed"


def test_every_stage_ends_with_the_same_pieces(
    places: tuple[Path, Path], kills: list[Path]
) -> None:
    """A model adapted to the task, three anchors, three users: five jobs, each killed once."""
    found = []
    for folder, seconds in zip(places, (0.0, OFTEN), strict=True):
        given: Any = {"base": {"task_adapt": ADAPT}, "compute": {"checkpoint_seconds": seconds}}
        with prepared_place(folder):
            again = partial(run, folder, pipeline.ROLES)
            found.append(until_done(lambda again=again, given=given: again(**deepcopy(given))))
            assert kept(store()) == []
    assert sorted(path.parent.name for path in kills) == [
        "meta_lora", "meta_lora", "meta_lora", "stacking", "task_adapt",
    ]  # fmt: skip
    calm, disturbed = found
    for take in (
        lambda done: done["base"]["adapter"],
        lambda done: done["bank"],
        lambda done: done["stacking"]["mta"][0],
        lambda done: done["scores"]["mta"],
    ):
        assert take(disturbed)["ref"]["sha256"] == take(calm)["ref"]["sha256"]


def test_the_tiny_base(
    places: tuple[Path, Path], kills: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model_stage, "Progress", Quiet)
    refs = []
    for folder, seconds in zip(places, (0.0, OFTEN), strict=True):
        with prepared_place(folder):
            refs.append(until_done(partial(base_of, folder, seconds))["ref"])
            assert kept(store()) == []
    assert [path.parent.name for path in kills] == ["base_model"]
    assert refs[0] == refs[1]


def base_of(folder: Path, seconds: float) -> dict[str, Any]:
    data = write_users(folder / "data", **pipeline.ROLES)
    given = {
        "data": str(data),
        "base": {"model": "tiny", "tiny": TINY},
        "anchors": pipeline.OPTIONS["anchors"],
        "compute": {"checkpoint_seconds": seconds},
    }
    config = resolve(given).model_dump(mode="json")
    prepared = result(prepare.fn(config, "LaMP-2M"))
    return result(base_model_stage.base_model.fn(config, "LaMP-2M", prepared))


# --- whose they are, and when they go -------------------------------------------------------------


def a_checkpoint(where: Store, stage: str, key: str, users: list[str], **about: Any) -> Path:
    made = checkpoints.checkpoint_of(RunConfig(), where, stage, key, users, **about)
    assert made is not None
    made.save(Saved(1, {"x": torch.zeros(1)}, {}))
    return made.path


def kept(where: Store) -> list[str]:
    return sorted(path.name for path in checkpoints.folder(where).glob("*/*"))


def test_none_where_none_is_wanted(where: Store) -> None:
    never = RunConfig.model_validate({"compute": {"checkpoint_seconds": 0}})
    assert checkpoints.checkpoint_of(never, where, "stacking", "k", ["u"]) is None


def test_the_key_is_of_the_stage_the_job_and_its_company(where: Store) -> None:
    options = RunConfig()
    keys = [
        made.key
        for made in (
            checkpoints.checkpoint_of(options, where, "stacking", "k", ["u"], rows=["a", "b"]),
            checkpoints.checkpoint_of(options, where, "stacking", "k", ["u"], rows=["b", "a"]),
            checkpoints.checkpoint_of(options, where, "stacking", "k", ["u"], rows=["a"]),
            checkpoints.checkpoint_of(options, where, "stacking", "l", ["u"], rows=["a"]),
            checkpoints.checkpoint_of(options, where, "meta_lora", "k", ["u"], rows=["a"]),
        )
        if made
    ]
    assert len(set(keys)) == 5
    # How often it is written changes no number.
    other = RunConfig.model_validate({"compute": {"checkpoint_seconds": 5}})
    again = checkpoints.checkpoint_of(other, where, "stacking", "k", ["u"], rows=["a"])
    assert again is not None
    assert again.key == keys[2]


def test_sweep_takes_what_nobody_resumes(where: Store) -> None:
    def make(out: Path) -> dict[str, Any]:
        (out / "x.json").write_text("{}")
        return {}

    for key in ("aa", "bb"):
        where.make("meta_lora", key, make)
    done = a_checkpoint(where, "meta_lora", "job1", ["u"], pieces=["aa", "bb"])
    half = a_checkpoint(where, "meta_lora", "job2", ["u"], pieces=["aa", "cc"])
    fresh = a_checkpoint(where, "stacking", "job3", ["u"])
    old = a_checkpoint(where, "stacking", "job4", ["u"])
    damaged = fresh.with_name("job5.safetensors")
    damaged.write_bytes(b"damaged")
    days = checkpoints.DAYS * 24 * 3600
    for path, age in ((old, days + 60), (fresh, days - 60)):
        os.utime(path, times=(time.time() - age,) * 2)
    host, pid, start = processes.host(), os.getpid(), psutil.Process().create_time()
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
    own = f"{PARTIAL}{host}~{pid}~{start:.0f}~x"
    # A process that is gone, one that had this one's pid before the machine was restarted.
    gone = (f"{dead.stdout.strip()}~{time.time():.0f}", f"{pid}~{start - 3600:.0f}")
    for name in (own, *(f"{PARTIAL}{host}~{process}~x" for process in gone)):
        (fresh.parent / name).write_bytes(b"x")
    checkpoints.sweep(where)
    assert not done.exists()
    assert kept(where) == sorted([half.name, fresh.name, damaged.name, own])


def test_a_user_who_is_forgotten(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """few-1's jobs go; those of others stay, even where a name begins alike."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")
    run(place, pipeline.ROLES, recipes_only=True)
    where = store()
    own = a_checkpoint(where, "stacking", "own", ["few-0", "few-1"])
    a_checkpoint(where, "stacking", "other", ["few-0", "few-12"])
    (own.parent / "damaged.safetensors").write_bytes(b"whose?")
    (own.parent / f"{PARTIAL}elsewhere~1~1~x").write_bytes(b"whose?")
    assert about_of(own) == {"stage": "stacking", "pieces": ["own"], "users": ["few-0", "few-1"]}
    done, left = forget(where, "few-1")
    assert left == []
    assert [line for line in done if line.startswith("checkpoints")] == [
        "checkpoints removed (half written): 1",
        "checkpoints removed (damaged): 1",
        "checkpoints removed (trained on the user): 1",
    ]
    assert kept(where) == ["other.safetensors"]


def test_what_was_trained_over_an_anchor_goes_with_the_anchor(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """anchor-3 is an anchor: users of the same data were being stacked on its LoRA."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")
    run(place, pipeline.ROLES, recipes_only=True)
    where = store()
    shutil.rmtree(checkpoints.folder(where), ignore_errors=True)  # of the test before
    a_checkpoint(where, "meta_lora", "own", ["anchor-3"])
    a_checkpoint(where, "meta_lora", "anchors", ["anchor-2"])
    a_checkpoint(where, "stacking", "over", ["few-0"])
    a_checkpoint(where, "stacking", "strangers", ["nobody-of-this-data"])
    before = set(kept(where))
    done, left = forget(where, "anchor-3")
    assert left == []
    assert [line for line in done if line.startswith("checkpoints")] == [
        "checkpoints removed (trained on the user): 1",
        "checkpoints removed (made with what was trained on the user): 1",
    ]
    assert before - set(kept(where)) == {"own.safetensors", "over.safetensors"}

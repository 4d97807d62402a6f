"""Clusters fitted again by evidence, on candidates whose answers are known by construction."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import anchors as module
from tasks.anchors import anchors, clustered, refit
from tasks.base_model import base_model
from tasks.embed import embedded_users
from tasks.prepare import prepared_users
from tasks.record import key_of
from tasks.results.models import Anchors, Clusters, Setting
from tasks.results.stage import Stage
from tasks.results.store import store
from tasks.text.questions import questions_of
from tests.unit.stages.pipeline import config_of, noted, prepared_place, stage_keys, until_done
from tests.unit.stages.users import user


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with prepared_place(tmp_path) as folder:
        yield folder


def candidate(name: str, tag: str) -> dict[str, Any]:
    made = user(name, 8)
    return made | {"profile": [item | {"tag": tag} for item in made["profile"]]}


# Five give every film one tag, four another. At the start one of each stands on the wrong side,
# one is noise, and one alone in a cluster.
COMEDY = [candidate(f"c{n}", "comedy") for n in range(5)]
ACTION = [candidate(f"v{n}", "violence") for n in range(4)]
START = [0, 0, 0, 1, -1, 1, 1, 0, 7]
WANTED = [0] * 5 + [1] * 4


def run(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    refits: int,
    seconds: float = 0.0,
    few_shot_items: int = 4,
    **anchor_options: Any,
) -> tuple[Clusters, Anchors]:
    """The last round's result, and what `anchors` makes of it."""
    monkeypatch.setattr(module.rule, "cluster", lambda *_: list(START))
    config = config_of(
        place,
        {
            "base": [user("base-1", 3)],
            "anchor": COMEDY + ACTION,
            "few_shot": [user("few-1", few_shot_items, queries=1)],
        },
        methods=["merge_only"],
        anchors={"train_on": "cluster", "refits": refits, "min_cluster_size": 2, "min_items": 4}
        | anchor_options,
        compute={"threads": 1, "checkpoint_seconds": seconds},
    )
    own, compute = config.method("merge_only"), config.compute
    users = prepared_users(config)
    base = base_model(config, users)
    questions = questions_of(own.prompt, users, own.base.model)
    embedded = embedded_users(own, users, questions, base, compute)
    setting = Setting(base=base, questions=questions, seed=own.seed, compute=compute)
    found = clustered(own.anchors, own.meta_lora, embedded, users.anchor, setting)
    return found, anchors(own.anchors, embedded, users.anchor, found)


def test_candidates_find_those_who_answer_alike(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, listed = run(place, monkeypatch, refits=5)
    assert list(found.clusters) == WANTED
    assert found.moved == 0
    members = {one.name: one.members for one in listed.anchors}
    assert members == {
        "cluster-0": tuple(one["user_id"] for one in COMEDY),
        "cluster-1": tuple(one["user_id"] for one in ACTION),
    }
    assert (listed.clusters, listed.noise) == (2, 0)


def test_a_run_goes_on_from_its_last_round(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds in one run, and the second made again from the first one's result, are alike."""
    rounds: list[dict[str, Any]] = []
    real = Stage.made

    def made(self: Stage[..., Any], arguments: dict[str, Any]) -> Any:
        rounds.extend([arguments] if self is refit else [])
        return real(self, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "made", made)
        whole, _ = run(place, monkeypatch, refits=2)
    assert [given["number"] for given in rounds] == [0, 1]
    assert len({refit.key(**given) for given in rounds}) == 2
    assert whole.bank is not None
    shutil.rmtree(store().path(whole.bank).parent)
    trained = noted(monkeypatch, "tasks.model.Model.train", lambda *_, **__: "trained")
    assert key_of(refit(**rounds[1])) == key_of(whole)
    assert trained == ["trained"]
    assert store().intact(whole.bank)


def test_what_decides_no_round_is_no_part_of_its_key(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few-shot user's new item; more rounds; which of the clusters are anchors."""
    with stage_keys() as keys:
        run(place, monkeypatch, refits=1)
        run(place, monkeypatch, refits=2)
        run(place, monkeypatch, refits=2, few_shot_items=5, min_items=5, train_on="both")
        run(place, monkeypatch, refits=1, refit_epochs=1)
    first, _, second, _, _, fewer = keys["refit"]
    assert keys["refit"] == [first, first, second, first, second, fewer]
    assert len({first, second, fewer}) == 3
    assert len(set(keys["embed"])) == 2


def test_a_round_that_was_killed_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: list[Path]
) -> None:
    """Each round killed once in its training; the second goes on from the LoRAs of the first."""
    wanted, _ = run(place, monkeypatch, refits=2)
    assert kills == []
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "again" / "store"))
    found, _ = until_done(lambda: run(place, monkeypatch, refits=2, seconds=1e-9))
    assert [path.parent.name for path in kills] == ["refit", "refit"]
    assert not list(store().checkpoints.glob("*/*"))
    assert key_of(found) == key_of(wanted)


def test_nobody_clusters_where_all_is_noise(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cluster there is nothing to fit, and users are anchors as without refits."""
    monkeypatch.setattr("tests.unit.stages.test_refit.START", [-1] * 9)
    found, listed = run(place, monkeypatch, refits=3)
    assert list(found.clusters) == [-1] * 9
    assert {one.members for one in listed.anchors} <= {(one["user_id"],) for one in COMEDY + ACTION}

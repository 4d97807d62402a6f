"""Clusters fitted again by evidence, on candidates whose answers are known by construction."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks import refit as refit_stage
from tasks.anchors import anchors
from tasks.base_model import base_model
from tasks.config import resolve
from tasks.embedding import embed
from tasks.prepare import prepare
from tasks.refit import assign, large_clusters, refit, to_ask
from tasks.stage import store
from tasks.store import checkpoints
from tasks.store.artifacts import Store
from tests.unit.stages.pipeline import OPTIONS, prepared_place, until_done
from tests.unit.stages.users import result, user, write_users


def test_small_clusters_and_noise_are_given_up() -> None:
    """Cluster 4 has two members, 2 three; -1 is noise, however many there are."""
    labels = [4, 2, -1, 2, -1, 4, -1, 2, 0]
    assert large_clusters(labels, 2) == [2, 4]
    assert large_clusters(labels, 3) == [2]
    assert large_clusters(labels, 4) == []


def test_the_likeliest_cluster_takes_a_candidate() -> None:
    """By hand: the largest number of each row, the first of equals; -inf is nobody's.

    The last two have no held-out item: one stays where it is, the other's cluster is gone.
    """
    evidence = np.array([[-3.0, -1.0], [-2.0, -2.0], [-np.inf, -9.0], [0.0, 0.0], [0.0, 0.0]])
    assert assign([5, 5, 3, 5, 8], evidence, [2, 1, 1, 0, 0], [3, 5]) == [5, 3, 5, 5, -1]


def test_later_rounds_ask_the_nearest_that_are_left() -> None:
    """The first candidate's cluster 9 was given up; nothing is left of the second's, and the
    third has none."""
    assert to_ask([[3, 9], [9, 8], [], [7, 3]], [3, 5, 7]) == [
        [True, False, False],
        [True, True, True],
        [True, True, True],
        [True, False, True],
    ]


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
    place: Path, monkeypatch: pytest.MonkeyPatch, refits: int, seconds: float = 0.0
) -> tuple[Any, dict[str, Any]]:
    """The stage's state, and what `anchors` makes of it."""
    monkeypatch.setattr(refit_stage, "clusters_of", lambda *_: list(START))
    data = write_users(
        place / "data",
        base=[user("base-1", 3)],
        anchor=COMEDY + ACTION,
        few_shot=[user("few-1", 4, queries=1)],
    )
    chosen = {"train_on": "cluster", "refits": refits, "min_cluster_size": 2, "min_items": 4}
    given = {
        "data": str(data),
        "base": {"model": str(place / "model"), "max_tokens": 64},
        "compute": {"threads": 1, "checkpoint_seconds": seconds},
    }
    config = resolve(OPTIONS | given | {"anchors": chosen}).model_dump(mode="json")
    prepared = result(prepare.fn(config, "LaMP-2M"))
    base = result(base_model.fn(config, "LaMP-2M", prepared))
    embedded = result(embed.fn(config, "LaMP-2M", prepared, base))
    state = refit.fn(config, "LaMP-2M", prepared, base, embedded)
    listed = anchors.fn(config, "LaMP-2M", prepared, embedded, result(state))
    return state, result(listed)["value"]


def test_candidates_find_those_who_answer_alike(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, listed = run(place, monkeypatch, refits=5)
    value = result(state)["value"]
    assert value["clusters"] == WANTED
    assert value["moved"] == 0
    members = {one["user_id"]: one["members"] for one in listed["anchors"]}
    assert members == {
        "cluster-0": [one["user_id"] for one in COMEDY],
        "cluster-1": [one["user_id"] for one in ACTION],
    }
    assert (listed["clusters"], listed["noise"]) == (2, 0)


def test_a_killed_run_goes_on_from_its_last_round(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds at once, and one round and then another, give the same bytes."""
    whole = result(run(place, monkeypatch, refits=2)[0])
    again = run(place, monkeypatch, refits=2)[0]
    assert again.name == "Cached"
    root = Path(place / "mta" / "store" / "refit")
    records = sorted(root.rglob("record.json"), key=lambda path: path.stat().st_mtime_ns)
    assert len(records) == 2
    last = next(r for r in records if json.loads(r.read_text())["key"] in whole["ref"]["uri"])
    for path in sorted(last.parent.rglob("*"), reverse=True):
        path.unlink()
    last.parent.rmdir()
    resumed = run(place, monkeypatch, refits=2)[0]
    assert resumed.name != "Cached"
    assert result(resumed)["ref"] == whole["ref"]
    assert Store(place / "mta" / "store").open(whole["ref"])


def test_a_round_that_was_killed_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: list[Path]
) -> None:
    """Each round killed once in its training; the second goes on from the LoRAs of the first."""
    wanted = result(run(place, monkeypatch, refits=2)[0])
    assert kills == []
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "again" / "store"))
    state = until_done(lambda: run(place, monkeypatch, refits=2, seconds=1e-9)[0])
    assert [path.parent.name for path in kills] == ["refit", "refit"]
    assert not list(checkpoints.folder(store()).glob("*/*"))
    assert result(state)["ref"] == wanted["ref"]


def test_nobody_clusters_where_all_is_noise(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cluster there is nothing to fit, and users are anchors as without refits."""
    monkeypatch.setattr("tests.unit.stages.test_refit.START", [-1] * 9)
    state, listed = run(place, monkeypatch, refits=3)
    assert result(state)["value"]["clusters"] == [-1] * 9
    assert {tuple(one["members"]) for one in listed["anchors"]} <= {
        (one["user_id"],) for one in COMEDY + ACTION
    }

"""Which pieces go with a user, in a small store made by hand: two clusters over a tiny base."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks import forget
from tasks.artifacts import Store
from tasks.pieces import RECORD

USERS = {
    "base": ["base-1", "base-2"],
    "anchor": ["anchor-1", "anchor-2", "anchor-3", "anchor-4"],
    "few_shot": ["few-1"],
}
CLUSTERS = {"cluster-0": ["anchor-1", "anchor-2"], "cluster-1": ["anchor-3", "anchor-4"]}
# By stage, with a number where there are several.
ALL = {
    "prepare", "base_model", "task_adapt", "anchors", "meta_lora 0", "meta_lora 1", "bank",
    "fusion", "stacking", "predictions", "score",
}  # fmt: skip
# What the few-shot user has of the bank.
OF_BANK = {"bank", "fusion", "stacking", "predictions", "score"}


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = Store(tmp_path / "mta" / "store")

    def piece(name: str, value: dict[str, Any], **tables: pl.DataFrame) -> None:
        def make(out: Path) -> dict[str, Any]:
            for stem, table in tables.items():
                table.write_parquet(out / f"{stem}.parquet")
            return value

        made.make(name.split()[0], hashlib.sha256(name.encode()).hexdigest(), make)

    piece("prepare", {}, **{role: _table(names) for role, names in USERS.items()})
    piece("base_model", {"model": "tiny"})
    piece("task_adapt", {"items": 6})
    chosen = [{"user_id": name, "members": members} for name, members in CLUSTERS.items()]
    everyone = pl.DataFrame({"user_id": USERS["anchor"] + USERS["few_shot"]})
    piece("anchors", {"anchors": chosen}, anchors=everyone)
    for number, name in enumerate(CLUSTERS):
        piece(f"meta_lora {number}", {"anchor": name})
    piece("bank", {"ids": list(CLUSTERS), "users": CLUSTERS})
    recipes = pl.DataFrame({"user_id": ["few-1"], "anchors": [["cluster-1"]]})
    piece("fusion", {}, recipes=recipes)
    for name in ("stacking", "predictions", "score"):
        piece(name, {"users": ["few-1"]})
    assert left(made) == ALL
    return made


def _table(names: list[str]) -> pl.DataFrame:
    def rows(name: str, kind: str, fields: tuple[str, str]) -> list[dict[str, str]]:
        return [dict(zip(fields, (f"{name} {kind} number 0", "drama"), strict=True))]

    return pl.DataFrame(
        {
            "user_id": names,
            "group": names,
            "profile": [rows(name, "film", ("text", "answer")) for name in names],
            "query": [rows(name, "question", ("input", "gold")) for name in names],
        }
    )


def left(where: Store) -> set[str]:
    names = {hashlib.sha256(name.encode()).hexdigest(): name for name in ALL}
    return {names[folder.name] for folder in where.root.glob("*/*/*")}


GONE = {
    "few-1": {"prepare", "anchors", "fusion", "stacking", "predictions", "score"},
    "anchor-1": {"prepare", "anchors", "meta_lora 0", *OF_BANK},
    "base-1": ALL,
}


@pytest.mark.parametrize("user_id", GONE)
def test_what_was_trained_on_the_user_goes_and_all_that_was_made_with_it(
    where: Store, user_id: str
) -> None:
    """Over a base model that was trained on the user, the LoRAs of clusters of others, too."""
    _, found = forget.forget(where, user_id)
    assert found == []
    assert left(where) == ALL - GONE[user_id]


def test_a_damaged_list_of_anchors_hides_no_cluster(where: Store) -> None:
    (record,) = where.root.glob(f"anchors/*/*/{RECORD}")
    record.write_text("{")
    _, found = forget.forget(where, "anchor-1")
    assert found == []
    assert left(where) == ALL - GONE["anchor-1"]

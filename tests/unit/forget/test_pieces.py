"""Which pieces go with a user, in a small store made by hand: two clusters over a tiny base."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.errors import InputError
from tasks.forget.user import forget
from tasks.store import checkpoints
from tasks.store.artifacts import Store
from tasks.store.pieces import RECORD

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

    # Windows over base-1 and anchor-1, of which no text is the same as in the author's row.
    pooled = pl.DataFrame({"user_id": ["window-1", "window-2"], "row": ["base-1", "anchor-1"]})
    tables = {role: _table(names) for role, names in USERS.items()}
    piece("prepare", _value(2), pooled=pooled, **tables)
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


def _value(pooled: int) -> dict[str, Any]:
    return {"counts": {"pooled_users": pooled}, "sha256": {"base": "0" * 64}}


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
GONE |= {"window-1": GONE["base-1"], "window-2": GONE["anchor-1"]}


@pytest.mark.parametrize("user_id", GONE)
def test_what_was_trained_on_the_user_goes_and_all_that_was_made_with_it(
    where: Store, user_id: str
) -> None:
    """Over a base model that was trained on the user, the LoRAs of clusters of others, too."""
    _, found = forget(where, user_id)
    assert found == []
    assert left(where) == ALL - GONE[user_id]


@pytest.mark.parametrize("user_id", GONE)
@pytest.mark.parametrize("half", [False, True])
def test_wherever_a_call_is_cut_off_the_next_one_removes_the_rest(
    where: Store, user_id: str, half: bool, tmp_path: Path
) -> None:
    """Between two pieces, and with a piece's record gone but not what else it is of."""
    for removals in range(len(GONE[user_id])):
        copied = _copy(where, tmp_path / f"after-{removals}")
        _forget_cut_off(copied, user_id, removals, half)
        _, found = forget(copied, user_id)
        assert found == []
        assert left(copied) == ALL - GONE[user_id], f"cut off after {removals}"


def _copy(where: Store, folder: Path) -> Store:
    shutil.copytree(where.root, folder / "store")
    return Store(folder / "store")


def _forget_cut_off(where: Store, user_id: str, removals: int, half: bool = False) -> None:
    """half: also without the record of the piece that is next."""
    really = where.remove
    done: list[str] = []

    def remove(stage: str, key: str) -> None:
        if len(done) == removals:
            if half:
                (where.root / stage / key[:2] / key / RECORD).unlink()
            raise KeyboardInterrupt
        done.append(stage)
        really(stage, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, "remove", remove)
        with pytest.raises(KeyboardInterrupt):
            forget(where, user_id)


def test_a_checkpoint_goes_before_what_says_whose_it_is(
    where: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training of another cluster over the base model that the user taught."""
    file = checkpoints.place(where, "meta_lora", "0" * 64)
    file.parent.mkdir(parents=True)
    header = json.dumps({"__metadata__": {"about": json.dumps({"users": CLUSTERS["cluster-1"]})}})
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    # The sweep would read it, and is not what is tested here.
    monkeypatch.setattr(checkpoints, "sweep", lambda _where: None)
    _forget_cut_off(where, "base-1", removals=len(GONE["base-1"]) - 1)
    assert not file.exists()


def test_a_damaged_list_of_anchors_hides_no_cluster(where: Store) -> None:
    (record,) = where.root.glob(f"anchors/*/*/{RECORD}")
    record.write_text("{")
    _, found = forget(where, "anchor-1")
    assert found == []
    assert left(where) == ALL - GONE["anchor-1"]


@pytest.mark.parametrize("again", [False, True])
def test_tables_that_do_not_say_who_was_pooled_are_left(where: Store, again: bool) -> None:
    """Of an earlier version: whoever is not named may be in them, until the data were run again."""

    def make(out: Path) -> dict[str, Any]:
        _table(["base-9"]).write_parquet(out / "base.parquet")
        return _value(1) | ({} if again else {"sha256": {"base": "1" * 64}})

    folder = where.make("prepare", "a" * 64, make).folder
    with pytest.raises(InputError) as raised:
        forget(where, "nobody")
    assert str(raised.value).startswith("nobody: no such user ")
    assert (f"{folder}: an earlier version pooled users here" in str(raised.value)) is not again
    _, found = forget(where, "few-1")
    assert [line.partition(":")[0] for line in found] == ([] if again else [str(folder)])
    assert forget(where, "base-9")[1] == []

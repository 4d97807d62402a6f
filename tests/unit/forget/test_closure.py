"""What of a store goes with a user, in a small store made by hand: two clusters, a tiny base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from filelock import FileLock

from tasks.errors import InputError
from tasks.forget.closure import stage_of
from tasks.forget.servers import Traces
from tasks.forget.user import forget
from tasks.results.rows import known_rows
from tasks.results.store import LOCKS, RESULTS, Store, store

USERS = {
    "base": ["base-1", "base-2"],
    "anchor": ["anchor-1", "anchor-2", "anchor-3", "anchor-4"],
    "few_shot": ["few-1", "few-2"],
}
CLUSTERS = {"cluster-0": ["anchor-1", "anchor-2"], "cluster-1": ["anchor-3", "anchor-4"]}
USUAL = [f"meta_lora {anchor}" for anchor in CLUSTERS]
EVERYONE = {"embed", "anchors", "bank", "fusion", "compare", "prepare", "tokens"}
OVER_BANK = {"stacking few-1", "answers few-1", "stacking few-2", "answers few-2"}
ALL = EVERYONE | OVER_BANK | {
    "tiny_model", "task_adapt", "meta_lora cluster-0", "meta_lora cluster-1", "answers plain few-1",
    "answers plain few-2",
}  # fmt: skip
GONE = {
    # Of few-2, whose batch is another, the tables and nothing that was trained or answered.
    "few-1": EVERYONE | {"stacking few-1", "answers few-1", "answers plain few-1"},
    "anchor-1": EVERYONE | OVER_BANK | {"meta_lora cluster-0"},
    "base-1": ALL,
}
GONE |= {"window-1": GONE["base-1"], "window-2": GONE["anchor-1"]}


class Made:
    """A store that is filled stage by stage, as the stages and Prefect do it."""

    def __init__(self) -> None:
        self.uris: dict[str, str] = {}

    def folder(self, name: str, **files: pl.DataFrame | dict[str, Any]) -> None:
        stage = name.split()[0]
        with store().new(stage, [f"row of {name}"]) as folder:
            (folder.path / "about.json").write_text(json.dumps({"made": name.split()[:1]}))
            (folder.path / "rows.bin").write_text(name)
            for stem, held in files.items():
                if isinstance(held, pl.DataFrame):
                    held.write_parquet(folder.path / f"{stem}.parquet")
                else:
                    (folder.path / f"{stem}.json").write_text(json.dumps(held))
        self.uris[name] = folder.file().uri

    def result(self, name: str, made_of: list[str], *others: str, **values: Any) -> None:
        """As Prefect 3.8 keeps it: JSON in JSON, the file named by the cache key."""
        files = {one: {"uri": f"{self.uris[one]}/x", "sha256": "0"} for one in (name, *others)}
        uris = [self.uris[one] for one in made_of]
        data = values | {"files": files, "made_of": uris}
        record = {"metadata": {}, "result": json.dumps({"__class__": "x", "data": data})}
        place = store().root / RESULTS / f"{stage_of(self.uris[name])}-{self.uris[name][-64:]}"
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(record))


@pytest.fixture
def made(where: Store, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = Made()
    # Windows over base-1 and anchor-1, of which no text is the same as in the author's row.
    pooled = pl.DataFrame({"user_id": ["window-1", "window-2"], "row": ["base-1", "anchor-1"]})
    tables = {role: _table(names) for role, names in USERS.items()}
    everybody = pl.DataFrame({"user_id": [name for names in USERS.values() for name in names]})
    made.folder("prepare", pooled=pooled, **tables)
    made.result("prepare", [], few_shot_ids=USERS["few_shot"])
    made.folder("tokens")
    made.folder("tiny_model")
    made.result("tiny_model", ["prepare"])
    made.folder("task_adapt")
    made.result("task_adapt", ["prepare", "tiny_model"], "tiny_model")
    base = ["tiny_model", "task_adapt"]
    made.folder("embed", embeddings=everybody)
    made.result("embed", ["prepare", *base])
    made.folder("anchors", anchors=everybody.filter(pl.col("user_id").str.contains("anchor|few")))
    made.result("anchors", ["prepare", "embed"])
    trained = []
    for anchor, members in CLUSTERS.items():
        trained.append(f"meta_lora {anchor}")
        made.folder(trained[-1], meta_lora={"anchor": anchor, "members": members})
        made.result(trained[-1], ["prepare", *base], members=members)
    made.folder("bank")
    made.result("bank", ["anchors", *trained], *trained)
    made.folder("fusion", recipes=pl.DataFrame({"user_id": USERS["few_shot"]}))
    made.result("fusion", ["prepare", "embed", "bank", *base, *trained])
    answered = []
    for user in USERS["few_shot"]:
        own = pl.DataFrame({"user_id": [user]})
        for stem in ("stacking", "answers", "answers plain"):
            made.folder(f"{stem} {user}", work=own)
        over = ["prepare", "bank", "fusion", *base, *trained]
        made.result(f"answers {user}", over, f"stacking {user}", "bank", users=[user])
        made.result(f"answers plain {user}", ["prepare", *base], users=[user])
        answered += [f"answers {user}", f"answers plain {user}"]
    made.folder("compare")
    made.result("compare", ["prepare", *answered])
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


def left(made: Made) -> set[str]:
    names = {uri: name for name, uri in made.uris.items()}
    return {names[place.relative_to(store().root).as_posix()] for place in store().folders()}


def results() -> set[str]:
    return {file.name for file in (store().root / RESULTS).iterdir()}


@pytest.mark.parametrize("user_id", GONE)
def test_what_was_trained_on_the_user_goes_and_all_that_was_made_with_it(
    made: Made, user_id: str
) -> None:
    """Over a base model that was trained on the user, the LoRAs of clusters of others, too."""
    _, found = forget(store(), user_id)
    assert found == []
    assert left(made) == ALL - GONE[user_id]
    kept = {made.uris[name] for name in left(made) if not name.startswith("stacking")}
    assert results() == {f"{stage_of(uri)}-{uri[-64:]}" for uri in kept}


@pytest.mark.parametrize(
    ("user_id", "wanted", "kept"),
    [
        ("base-1", {*CLUSTERS}, {*USUAL}),
        ("anchor-1", {"cluster-0"}, {"meta_lora cluster-1"}),
        ("few-1", set[str](), {*USUAL, "experts", "experts cluster-0", "experts cluster-1"}),
    ],
)
def test_what_all_share_was_trained_on_base_users(
    where: Store, monkeypatch: pytest.MonkeyPatch, user_id: str, wanted: set[str], kept: set[str]
) -> None:
    """group_experts over a given base model: the LoRA of base users is in every member's.

    All of them are trained together, so they go together; of a few-shot user they have nothing.
    MLflow is asked for the runs of these anchors, and of the user.
    """
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = Made()
    made.folder("prepare", **{role: _table(names) for role, names in USERS.items()})
    made.result("prepare", [])
    members = [f"experts {anchor}" for anchor in CLUSTERS]
    for number, (anchor, own) in enumerate(CLUSTERS.items()):
        for name in (USUAL[number], members[number]):
            made.folder(name, meta_lora={"anchor": anchor, "members": own})
        made.result(USUAL[number], ["prepare"])
    # The map beside it shows all users.
    made.folder("bank", users=pl.DataFrame({"user_id": [*USERS["anchor"], *USERS["few_shot"]]}))
    made.result("bank", ["prepare", *USUAL])
    names = [name for own in CLUSTERS.values() for name in own]
    with store().new("experts") as folder:
        (folder.path / "members.json").write_text(json.dumps(names))
    made.uris["experts"] = folder.uri
    made.result("experts", ["prepare", "bank", *USUAL], *members)
    asked: list[set[str]] = []

    def searched(*given: Any, **options: Any) -> Traces:
        if options.get("remove"):
            asked.append(given[1].anchors)
        return Traces()

    monkeypatch.setattr("tasks.forget.user.traces_in_mlflow", searched)
    done, found = forget(store(), user_id)
    assert (asked, found) == ([wanted | {user_id}], [])
    assert left(made) == kept
    trained = [line for line in done if line.startswith("trained on the user")]
    assert len(trained) == bool(wanted)


def test_rows_are_found_as_far_as_they_are_there(made: Made) -> None:
    keys = {name: f"row of {name}" for name in ALL}
    assert set(known_rows("*", list(keys.values()), lambda _: ["x"])) == {*keys.values()}
    forget(store(), "few-1")
    found = known_rows("*", list(keys.values()), lambda _: ["x"])
    assert set(found) == {keys[name] for name in left(made)}


@pytest.mark.parametrize("user_id", ["few-1", "window-1", "window-2"])
@pytest.mark.parametrize("half", [False, True])
def test_wherever_a_call_is_cut_off_the_next_one_removes_the_rest(
    made: Made, user_id: str, half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two removals, and within one."""
    whole = store().root
    for removals in range(len(GONE[user_id]) + 3):
        monkeypatch.setenv("MTA_STORE", str(tmp_path / f"after-{removals}" / "store"))
        shutil.copytree(whole, store().root)
        _forget_cut_off(user_id, removals, half)
        _, found = forget(store(), user_id)
        assert found == []
        assert not left(made) & GONE[user_id], f"cut off after {removals}"
        # What a cut-off call left without its result goes as well; no base model, though.
        assert {"tiny_model"} & left(made) == {"tiny_model"} - GONE[user_id]


def _forget_cut_off(user_id: str, removals: int, half: bool = False) -> None:
    """half: the next removal is begun."""
    really = Store.remove
    done: list[Path] = []

    def remove(self: Store, place: Path) -> None:
        if len(done) == removals:
            if half and place.is_dir():
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(shutil, "rmtree", _killed)
                    really(self, place)
            raise KeyboardInterrupt
        done.append(place)
        really(self, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "remove", remove)
        with pytest.raises(KeyboardInterrupt):
            forget(store(), user_id)


def _killed(folder: Path, **_: Any) -> None:
    next(file for file in folder.rglob("*") if file.is_file()).unlink()
    raise KeyboardInterrupt


def test_checkpoints_go_before_what_says_whose_they_are(made: Made) -> None:
    """A training of another cluster over the base model that the user taught."""
    file = store().checkpoints / "meta_lora" / f"{'0' * 64}.safetensors"
    file.parent.mkdir(parents=True)
    header = json.dumps({"__metadata__": {"about": json.dumps({"users": CLUSTERS["cluster-1"]})}})
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    _forget_cut_off("base-1", removals=0)
    assert not file.exists()


@pytest.mark.parametrize("name", sorted(ALL - {"tokens", "stacking few-1", "stacking few-2"}))
def test_a_result_that_cannot_be_read_hides_nothing(made: Made, name: str) -> None:
    uri = made.uris[name]
    (store().root / RESULTS / f"{stage_of(uri)}-{uri[-64:]}").write_text("{")
    _, found = forget(store(), "anchor-1")
    assert found == []
    assert not left(made) & GONE["anchor-1"]


def test_a_damaged_table_goes(made: Made) -> None:
    (store().root / made.uris["prepare"] / "anchor.parquet").write_bytes(b"x")
    _, found = forget(store(), "anchor-1")
    assert found == []
    assert not left(made) & GONE["anchor-1"]


def test_vocabularies_labels_and_numbers_of_items_name_nobody(made: Made) -> None:
    """Ids of LaMP are numbers, and so are tokens, ratings and the points of a curve."""
    model = store().root / made.uris["tiny_model"] / "tokenizer.json"
    model.write_text(json.dumps({"model": {"vocab": {"10": 1}}}))
    (store().state / "runs").mkdir()
    values = {"curve": {"10": {}}, "task": {"labels": ["10"]}}
    (store().state / "runs" / "one.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"^10: no such user"):
        forget(store(), "10")


def test_a_run_under_way_is_waited_for(made: Made) -> None:
    place = store().root / LOCKS / "meta_lora-x.lock"
    place.parent.mkdir()
    with FileLock(place), pytest.raises(InputError, match=r"x\.lock is held by a run; let it end"):
        forget(store(), "few-1")
    assert left(made) == ALL
    forget(store(), "few-1")
    assert left(made) == ALL - GONE["few-1"]

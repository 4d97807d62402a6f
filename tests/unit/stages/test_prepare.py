"""Preparing users: tables per role, counts, and what makes it run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.config.run import resolve
from tasks.config.task import TaskConfig
from tasks.errors import InputError
from tasks.lamp.definitions import ASKS, LABELS, parts
from tasks.lamp.folders import ROLES
from tasks.lamp.formats import copy_users
from tasks.lamp.synthetic import World
from tasks.prepare import prepare, prepared_users, source
from tasks.record import File
from tasks.results.models import Prepared
from tasks.results.store import MAKING, Store, store
from tasks.users import each_user, users_in_order, users_of
from tests.official import write_official
from tests.unit.lamp.web import Site, official, serving
from tests.unit.stages.users import user, write_users

ROLES_GIVEN = {
    "base": [user("base-1", 3), user("base-2", 4)],
    "anchor": [user("anchor-1", 5)],
    "few_shot": [user("few-1", 2, queries=2), user("few-2", 3, queries=1)],
}


def config_of(data: Path, lamp_task: str = "LaMP-2M", **given: Any) -> TaskConfig:
    settings = {"data": str(data), "anchors": {"min_items": 1}, "items_curve": [], **given}
    settings["split"] = {"base_candidates": False} | given.get("split", {})
    config = resolve(settings)
    return config.for_task(lamp_task, config.seed)


def run(data: Path, lamp_task: str = "LaMP-2M", **given: Any) -> Prepared:
    return prepared_users(config_of(data, lamp_task, **given))


def key(data: Path, **given: Any) -> str:
    """Of what `run` gives."""
    config = config_of(data, **given)
    return prepare.key(source(config), config.split, config.task, config.seed)


def refusal(data: Path, lamp_task: str = "LaMP-2M", **given: Any) -> str:
    """The one line that is said instead; nothing is stored."""
    before = store().folders()
    with pytest.raises(InputError) as caught:
        run(data, lamp_task, **given)
    assert "\n" not in str(caught.value)
    assert store().folders() == before
    assert list((store().root / MAKING).glob("*")) == []
    return str(caught.value)


def ids(table: File) -> list[str]:
    return [user["user_id"] for user in users_of(table)]


def test_tables_and_counts(where: Store, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Two base users, one candidate, two few-shot users with three queries; one bad item."""
    roles = json.loads(json.dumps(ROLES_GIVEN))
    roles["few_shot"][0]["profile"].append({"id": "x", "description": "ok", "tag": "no such tag"})
    prepared = run(write_users(tmp_path / "data", **roles))
    assert {
        name: prepared.counts[name]
        for name in (
            "users",
            "groups",
            "base_users",
            "anchor_candidates",
            "few_shot_users",
            "few_shot_groups",
            "queries",
        )
    } == {
        "users": 5,
        "groups": 5,
        "base_users": 2,
        "anchor_candidates": 1,
        "few_shot_users": 2,
        "few_shot_groups": 2,
        "queries": 3,
    }
    assert prepared.dropped == {"profile item with a label outside the task's set": 1}
    assert prepared.few_shot_ids == ("few-1", "few-2")
    assert prepared.instruction == "Which tag? description: "
    assert (prepared.optimum, prepared.population) == (None, None)
    for role in ROLES:
        table = pl.read_parquet(where.path(prepared.side(role)))
        assert table["user_id"].to_list() == [item["user_id"] for item in ROLES_GIVEN[role]]
    first = users_of(prepared.few_shot)[0]
    assert first["profile"] == [
        {"id": f"few-1-{n}", "text": f"few-1 film number {n}", "answer": roles_tag("few_shot")}
        for n in range(2)
    ]
    assert first["query"][0]["input"] == "Which tag? description: few-1 film number 2"
    chosen = users_of(prepared.few_shot, ["few-2", "nobody"])
    assert [found["user_id"] for found in chosen] == ["few-2"]
    named = users_in_order(prepared.few_shot, ["few-2", "few-1"])
    assert [found["user_id"] for found in named] == ["few-2", "few-1"]
    assert list(each_user(prepared.few_shot)) == users_of(prepared.few_shot)
    out = capsys.readouterr().out
    assert "5 users by 5 authors" in out
    assert "dropped: 1 x profile item with a label outside the task's set" in out
    # few-1's two golds are one tag, few-2's is another.
    assert prepared.audit["labels"]["golds"]["majority_share"] == pytest.approx(2 / 3, abs=1e-6)
    assert "is right for 66.7% of the queries (entropy of the golds: 0.92 bits)" in out
    assert prepared.audit["groups"] == {"all": {"1": 5}, "few_shot": {"1": 2}}
    assert "stands in a profile" not in out


def roles_tag(role: str) -> str:
    return ROLES_GIVEN[role][0]["profile"][0]["tag"]


def test_found_again_wherever_it_lies_and_made_again_when_changed(
    where: Store, tmp_path: Path
) -> None:
    data = write_users(tmp_path / "data", **ROLES_GIVEN)
    first, before = run(data), key(data)
    assert key(data) == key(write_users(tmp_path / "elsewhere", **ROLES_GIVEN)) == before
    # What this stage does not read changes nothing; what it reads does.
    assert key(data, stacking={"rank": 9}) == before
    assert key(data, seed=1) != before
    assert key(data, split={"same_author_share": 0.9}) != before
    roles = ROLES_GIVEN | {"few_shot": [user("few-1", 2, queries=2)]}
    write_users(data, **roles)
    assert key(data) != before
    changed = run(data)
    assert changed.few_shot_ids == ("few-1",)
    assert changed.few_shot.sha256 != first.few_shot.sha256
    # The roles that did not change have the tables they had, so what stands on them is found.
    for role in ("base", "anchor"):
        assert changed.side(role).sha256 == first.side(role).sha256


@pytest.mark.parametrize("change", ["another file", "a file more", "a file less"])
def test_what_changes_while_it_is_read_is_not_kept(
    where: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The key has the hashes of before; what was read may be either."""
    data = write_users(tmp_path / "data", **ROLES_GIVEN)
    before = {file: file.read_bytes() for file in data.iterdir()}
    one = min(before)

    def read(*given: Any) -> Any:
        found = copy_users(*given)
        if change == "a file more":
            (data / "more.json").write_text("[]")
        elif change == "a file less":
            one.unlink()
        else:
            one.write_bytes(before[one].replace(b"film number 1", b"film number 7"))
        return found

    with monkeypatch.context() as patch:
        patch.setattr("tasks.prepare.copy_users", read)
        line = refusal(data)
    assert line == (
        f"data: {data} changed while it was read, so nothing is made of it; start the run again "
        "when it stays"
    )
    (data / "more.json").unlink(missing_ok=True)
    for file, content in before.items():
        file.write_bytes(content)
    assert run(data).counts["users"] == 5


def test_a_folder_per_lamp_task_is_preferred(where: Store, tmp_path: Path) -> None:
    write_users(tmp_path / "data" / "LaMP-2M", **ROLES_GIVEN)
    assert run(tmp_path / "data").counts["users"] == 5


def test_base_users_that_are_candidates_are_counted_once(where: Store, tmp_path: Path) -> None:
    data = write_users(tmp_path / "data", **ROLES_GIVEN)
    apart, both = run(data), run(data, split={"base_candidates": True})
    for prepared in (apart, both):
        ids = [user["user_id"] for table in prepared.unscored for user in users_of(table)]
        assert sorted(ids) == ["anchor-1", "base-1", "base-2"]
    assert [user["user_id"] for user in users_of(both.anchor)] == ["anchor-1", "base-1", "base-2"]
    assert both.base.sha256 == apart.base.sha256
    assert both.few_shot.sha256 == apart.few_shot.sha256


def test_one_user_file_is_split(where: Store, tmp_path: Path) -> None:
    """Twelve users in thirds: four base, four candidates, four few-shot; none on two sides."""
    file = tmp_path / "users.json"
    file.write_text(json.dumps([user(f"u{n:02d}", 3, queries=1) for n in range(12)]))
    prepared = run(file)
    sides = {role: set(ids(prepared.side(role))) for role in ROLES}
    assert {role: len(ids) for role, ids in sides.items()} == dict.fromkeys(ROLES, 4)
    assert len(set.union(*sides.values())) == 12


@pytest.mark.parametrize("kind", ["grouped", "published"])
def test_who_stands_in_an_authors_row_is_written_down(
    where: Store, tmp_path: Path, kind: str
) -> None:
    """A window over base-1's items that has one more; published, each window is a row."""
    window = user("base-1", 4) | {"user_id": "window"}
    # A few-shot user without a query is left out, not pooled.
    silent = ROLES_GIVEN["few_shot"][0] | {"user_id": "silent", "query": []}
    roles = {
        "base": [*ROLES_GIVEN["base"], window],
        "anchor": ROLES_GIVEN["anchor"],
        "few_shot": [*ROLES_GIVEN["few_shot"], silent],
    }
    prepared = run(write_users(tmp_path / "data", **roles), split={"kind": kind})
    pooled = pl.read_parquet(where.path(prepared.pooled))
    assert pooled.columns == ["user_id", "row"]
    assert pooled.rows() == ([("window", "base-1")] if kind == "grouped" else [])
    assert prepared.counts["pooled_users"] == pooled.height


def test_what_the_log_says_of_windows(
    where: Store, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Two few-shot users with the same items; the query of one stands in the other's profile."""
    first, second = user("few-1", 3, queries=1), user("few-1", 4)
    second |= {"user_id": "few-1 again", "query": []}
    third = user("few-2", 2, queries=1)
    roles = ROLES_GIVEN | {"few_shot": [first, second | {"query": third["query"]}]}
    prepared = run(write_users(tmp_path / "data", **roles))
    assert prepared.audit["queries"]["few_shot"]["text"] == {
        "any": 1,
        "own": 0,
        "sibling": 1,
        "other": 0,
    }
    out = capsys.readouterr().out
    assert "few-shot authors by their number of users: 1 of 2" in out
    assert (
        "queries whose text stands in a profile: 1 of 2 (0 in the user's own, 1 in another of "
        "the author's, 0 in another author's), with the gold answer: 1"
    ) in out
    assert "texts that stand in several profiles: 3 of 16; texts with several answers: 0" in out


def test_an_author_on_two_sides_is_an_error_unless_allowed(where: Store, tmp_path: Path) -> None:
    """An anchor candidate with the content of a few-shot user."""
    twin = user("few-1", 2) | {"user_id": "twin"}
    roles = ROLES_GIVEN | {"anchor": [*ROLES_GIVEN["anchor"], twin]}
    data = write_users(tmp_path / "data", **roles)
    assert "anchor user 'twin' with few_shot user 'few-1'" in refusal(data)
    prepared = run(data, split={"allow_shared_groups": True})
    assert prepared.counts["removed_shared_group"] == 1
    assert prepared.audit["shared_groups"] == {"anchor": 1, "base": 0}
    assert ids(prepared.anchor) == ["anchor-1"]


def test_the_benchmarks_own_files(
    where: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """`data=lamp` downloads them once, and its tables are those of the same files in a folder."""
    shown: list[tuple[str, int, int]] = []

    class Bar:
        def __init__(self, _key: str, what: str, _total: int) -> None:
            self.what = what

        def update(self, done: int, total: int) -> None:
            shown.append((self.what, done, total))

    monkeypatch.setattr("tasks.prepare.Progress", Bar)
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    monkeypatch.delenv("http_proxy", raising=False)
    questions, outputs = official(users=12, items=3)
    there = "/LaMP/time/LaMP_2/new/dev/dev"
    with serving(site := Site()):
        site.files = {f"{there}_questions.json": questions, f"{there}_outputs.json": outputs}
        lamp = {"url": site.url, "split": "time", "cache": str(tmp_path / "cache")}
        prepared = run(Path("lamp"), lamp=lamp)
        # Another split is another address; what the site answers there is one line.
        missing = refusal(Path("lamp"), lamp=lamp | {"split": "user"})
        assert f"{site.url}/LaMP_2/new/dev/dev_questions.json: HTTP 404" in missing
    assert prepared.counts["users"] == 12
    assert prepared.instruction.endswith("movie relate to? description: ")
    assert shown[-1] == ("LaMP-2M: MB of dev_outputs.json", 1, 1)
    assert "sha256" in capsys.readouterr().out
    # The site is gone by now.
    found = key(Path("lamp"), lamp=lamp)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "dev_questions.json").write_bytes(questions)
    (tmp_path / "folder" / "dev_outputs.json").write_bytes(outputs)
    assert key(tmp_path / "folder") == found
    again = run(tmp_path / "folder")
    assert [again.side(role) for role in ROLES] == [prepared.side(role) for role in ROLES]


@pytest.mark.parametrize("user_id", ["../../x", "/etc/passwd", "a/b", "..", "用户"])
def test_a_users_id_is_no_path(where: Store, tmp_path: Path, user_id: str) -> None:
    roles = ROLES_GIVEN | {"few_shot": [user(user_id, 2, queries=1)]}
    prepared = run(write_users(tmp_path / "data", **roles))
    assert prepared.few_shot_ids == (user_id,)
    written = {
        path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".json"
    }
    assert written == {"base.parquet", "anchor.parquet", "few_shot.parquet", "pooled.parquet"}


def test_bad_input_is_one_line(where: Store, tmp_path: Path) -> None:
    assert "absent" in refusal(tmp_path / "absent")
    broken = write_users(tmp_path / "data", **ROLES_GIVEN) / "user_few_shot.json"
    broken.write_text("{")
    assert "user_few_shot.json" in refusal(tmp_path / "data")


def test_no_candidate_has_a_long_enough_history(where: Store, tmp_path: Path) -> None:
    """The longest candidate has 5 items: 5 will do, 6 will not, and the line says both."""
    data = write_users(tmp_path / "data", **ROLES_GIVEN)
    assert run(data, anchors={"min_items": 5}).longest_candidate == 5
    line = refusal(data, anchors={"min_items": 6})
    assert line.startswith(f"{data}: no anchor candidate has anchors.min_items 6 items or more")
    assert "longest history has 5, and anchors of mta_published are single" in line
    # Whole clusters have more, and are not there yet.
    assert run(data, anchors={"min_items": 6}, methods=["mta"]).longest_candidate == 5


def test_the_published_split(where: Store, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Two windows over one author among twelve users: users are divided, and that is said."""
    users = [user(f"u{n:02d}", 4, queries=1) for n in range(10)]
    window = user("author", 5, queries=1)
    users += [window | {"user_id": "w1"}, window | {"user_id": "w2", "query": []}]
    file = tmp_path / "users.json"
    file.write_text(json.dumps(users))
    split = {"kind": "published", "few_shot_items": 3, "few_shot_users": 2}
    prepared = run(file, split=split)
    few_shot = users_of(prepared.few_shot)
    assert list(prepared.few_shot_ids) == [item["user_id"] for item in few_shot]
    # The two with fewest items above three, of which they keep the last three.
    assert [[i["id"] for i in item["profile"]] for item in few_shot] == [
        [f"{item['user_id']}-{n}" for n in (1, 2, 3)] for item in few_shot
    ]
    assert prepared.counts["unseen_few_shot_items"] == 2
    # The other ten in two halves; base and anchor hold the windows, on one side or on two.
    sides = {role: set(ids(prepared.side(role))) for role in ROLES}
    assert [len(sides[role]) for role in ROLES] == [5, 5, 2]
    apart = len({"w1", "w2"} & sides["base"]) == 1
    assert prepared.counts["shared_author"] == int(apart)
    assert "split by user, as published: 5 base users, 5 anchor candidates" in (
        capsys.readouterr().out
    )


def test_few_shot_users_in_a_folder_of_their_own(where: Store, tmp_path: Path) -> None:
    """Where Per-Pcs and MTA have them; another user there is other data."""
    data = write_users(tmp_path / "data", **{k: ROLES_GIVEN[k] for k in ("base", "anchor")})
    (data / "test_100").mkdir()
    file = data / "test_100" / "test_100.json"
    file.write_text(json.dumps(ROLES_GIVEN["few_shot"]))
    assert run(data).few_shot_ids == ("few-1", "few-2")
    file.write_text(json.dumps(ROLES_GIVEN["few_shot"][:1]))
    assert run(data).few_shot_ids == ("few-1",)


def test_official_papers_are_asked_about(
    where: Store, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """LaMP-1 without citations: every paper of every side has a question, and it is said."""
    prepared, items = run(write_official(tmp_path / "data", "LaMP-1"), "LaMP-1"), 0
    own = {
        role: {i["text"].partition(ASKS)[0] for u in users_of(prepared.side(role))
               for i in u["profile"]}
        for role in ROLES
    }  # fmt: skip
    for role in ROLES:
        for one in users_of(prepared.side(role)):
            for item in one["profile"]:
                items += 1
                _, *references = parts(item["text"])
                related = references[LABELS.index(item["answer"])]
                assert f'"{related}"' in own[role]
                # No few-shot user's paper is shown to others, not even as a wrong answer.
                other = references[1 - LABELS.index(item["answer"])]
                assert f'"{other}"' in own["base"] | own["anchor"]
    assert prepared.counts["papers_asked_by_their_author"] == items > 18 * 10
    # Before anything is asked there are no labels to count.
    assert prepared.audit["labels"]["items"] is None
    assert f"papers asked by their author: {items}" in capsys.readouterr().out


def test_nothing_to_ask_of_papers(where: Store, tmp_path: Path) -> None:
    """Users with one paper each: one line, and no table."""
    data = write_official(tmp_path / "data", "LaMP-1", items=1)
    assert "LaMP-1: the papers name no citation" in refusal(data, "LaMP-1")


def test_a_generated_world_says_who_is_who(where: Store) -> None:
    """`population.parquet` is the truth of the world, user by user; other data have none."""
    options = {"base_users": 2, "anchor_candidates": 2, "few_shot_users": 1, "items_min": 11,
               "items_max": 12, "few_shot_items": 3, "queries": 1, "themes": 4}  # fmt: skip
    prepared = run(Path("synthetic"), synthetic=options)
    assert prepared.population
    table = pl.read_parquet(where.path(prepared.population))
    world = World("LaMP-2M", resolve({"synthetic": options}).synthetic, 0)
    assert table.columns == ["user_id", "first", "second", "mixture"]
    assert {row[0]: row[1:] for row in table.iter_rows()} == {
        user_id: (one.first, one.second, one.mixture) for user_id, one in world.tastes().items()
    }

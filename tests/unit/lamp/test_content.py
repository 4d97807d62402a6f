"""What items are about, keys that stand for them, and sides written from keys."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tasks.lamp.tables as tables
from tasks.lamp.audit import audit, query_places
from tasks.lamp.citations import has_unasked
from tasks.lamp.content import about, asked, keyed
from tasks.lamp.definitions import LampTask, get_task
from tasks.lamp.formats import copy_users, read_users
from tasks.lamp.prompts import question_text
from tasks.lamp.tables import read_table, write_side, write_sides
from tests.unit.lamp.helpers import movie, question, split_of, user, write

MOVIES = get_task("LaMP-2M")
PAPERS = get_task("LaMP-1")
THIRDS: dict[str, Any] = {"base_share": 1 / 3, "anchor_share": 1 / 3, "same_author_share": 0.5}

# All that Python calls white space, and what looks like it.
spaced = st.text(
    st.sampled_from("ab \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u2003\u3000\u200b")
).map(lambda text: text + " with the title " * (len(text) % 3))


@given(st.lists(spaced, min_size=1))
def test_white_space_as_python_has_it(texts: list[str]) -> None:
    column = pl.Series("text", texts)
    assert pl.select(about(pl.lit(column), MOVIES)).to_series().to_list() == [
        " ".join(text.split()) for text in texts
    ]
    assert pl.select(asked(pl.lit(column), MOVIES)).to_series().to_list() == [
        " ".join(question_text(text, MOVIES).split()) for text in texts
    ]


def test_papers_are_about_their_title() -> None:
    texts = pl.Series([f'"a  b"{PAPERS.asks} [1]: "x" [2]: "y"', "no question"])
    assert pl.select(about(pl.lit(texts), PAPERS)).to_series().to_list() == ['"a b"', "no question"]
    start = "For an author who has written the paper with the title "
    assert pl.select(asked(pl.lit(start + texts), PAPERS)).to_series().to_list() == [
        '"a b"',
        "no question",
    ]


def users_file(folder: Path, seed: int) -> Path:
    """Thirty users by some ten authors, with items that differ in white space or answer only."""
    chance = random.Random(seed)
    users = []
    for number in range(30):
        author = chance.randrange(10)
        texts = [f"film {author} {n}" for n in chance.sample(range(12), chance.randint(1, 9))]
        items = [
            movie(
                text.replace(" ", chance.choice([" ", "  "])), chance.choice(["comedy", "action"])
            )
            for text in [*texts, f"common {chance.randrange(3)}"]
        ]
        queries = [
            question(f"{number}/{n}", f"film {chance.randrange(10)} {chance.randrange(12)}")
            for n in range(chance.randrange(3))
        ]
        users.append(user(f"u{chance.randrange(1000):03d}-{number}", *items, query=queries))
    return write(folder / "users.json", users)


def split(users: pl.DataFrame, task: LampTask) -> Any:
    return split_of(users, task, seed=0, **THIRDS)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [1, 700, 100_000])
def test_a_split_of_keys_is_the_split_of_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, size: int
) -> None:
    """Same sides, counts and audit; and written out, the same users, in row groups of any size."""
    monkeypatch.setattr(tables, "ROW_GROUP", size)
    file = users_file(tmp_path, seed)
    everyone = tmp_path / "everyone.arrow"
    loaded = read_users(file, MOVIES)
    found = copy_users(file, MOVIES, everyone)
    expected, got = split(loaded.users, MOVIES), split(keyed(everyone, MOVIES), MOVIES)
    assert got.counts == expected.counts
    assert audit(got.users, found.dropped, MOVIES) == audit(expected.users, loaded.dropped, MOVIES)
    write_sides(everyone, {side: getattr(got, side) for side in ("base", "few_shot")}, tmp_path)
    for side in ("base", "few_shot"):
        assert read_table(tmp_path / f"{side}.parquet").equals(getattr(expected, side))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"users.json", "everyone.arrow", "base.parquet", "few_shot.parquet"}


def tweets_file(folder: Path) -> Path:
    """Windows over tweets; a query paraphrases one of its user's, of others or of nobody."""
    chance = random.Random(7)
    users = []
    for number in range(24):
        own = chance.sample(range(9), chance.randint(3, 7))
        texts = [f"tweet {number // 3} {n}".replace(" ", " " * chance.randint(1, 2)) for n in own]
        queries = [
            {"id": f"{number}/{n}", "input": f"Paraphrase before or after it: {n}", "gold": gold}
            for n, gold in enumerate((texts[0], texts[0], f"tweet {chance.randrange(12)} 1"))
        ]
        profile = [{"id": str(n), "text": text} for n, text in enumerate(texts)]
        users.append({"user_id": f"u{number:02d}", "profile": profile, "query": queries})
    return write(folder / "users.json", users)


def test_of_paraphrases_the_gold_is_looked_for(tmp_path: Path) -> None:
    """By texts and by keys: u's and v's gold stands in u's profile; the input is elsewhere."""
    task = get_task("LaMP-7")
    query = {"id": "q", "input": "x before or after it: the other", "gold": "one  tweet"}
    users = [
        {"user_id": "u", "profile": [{"id": "1", "text": "one tweet"}], "query": [query]},
        {"user_id": "v", "profile": [{"id": "1", "text": "the other"}],
         "query": [query | {"id": "r"}]},
    ]  # fmt: skip
    file, everyone = write(tmp_path / "users.json", users), tmp_path / "everyone.arrow"
    copy_users(file, task, everyone)
    for frame in (read_users(file, task).users, keyed(everyone, task)):
        table = frame.with_columns(group=pl.col("user_id"))
        places = {"any": 2, "own": 1, "sibling": 0, "other": 1}
        assert query_places(table, table, task) == places
        assert audit(table, {}, task)["queries"]["all"]["text_and_answer"] == places


@pytest.mark.parametrize("name", ["LaMP-2M", "LaMP-7"])
@pytest.mark.parametrize("kind", ["grouped", "published"])
def test_every_kind_of_split_goes_by_keys(tmp_path: Path, name: str, kind: str) -> None:
    """Of paraphrases too, where two queries with one gold are two; same sides, counts and audit."""
    task = get_task(name)
    file = tweets_file(tmp_path) if name == "LaMP-7" else users_file(tmp_path, 0)
    everyone = tmp_path / "everyone.arrow"
    loaded, found = read_users(file, task), copy_users(file, task, everyone)
    if kind == "grouped":
        expected, got = split(loaded.users, task), split(keyed(everyone, task), task)
    else:
        chosen = {"kind": "published", **THIRDS, "few_shot_users": 5, "few_shot_items": 4}
        expected = split_of(loaded.users, task, **chosen)
        got = split_of(keyed(everyone, task), task, **chosen)
    assert got.counts == expected.counts
    assert audit(got.users, found.dropped, task) == audit(expected.users, loaded.dropped, task)
    names = ("base", "anchor", "few_shot")
    write_sides(everyone, {side: getattr(got, side) for side in names}, tmp_path)
    for side in names:
        assert read_table(tmp_path / f"{side}.parquet").equals(getattr(expected, side))
    asked = pl.concat([got.base, got.anchor, got.few_shot])["query"].list.len()
    assert (asked > 2).any() or name == "LaMP-2M"


def test_papers_without_a_question_have_keys(tmp_path: Path) -> None:
    """They are about what a query asks for, and their answer is no label that is counted."""
    asked_for = f'For an author of the paper with the title "b"{PAPERS.asks} [1]: "x" [2]: "y"'
    one = {
        "user_id": "u",
        "profile": [{"id": "1", "title": "a"}, {"id": "2", "title": "b"}],
        "query": [{"id": "q", "input": asked_for, "gold": "[1]"}],
    }
    everyone = tmp_path / "everyone.arrow"
    copy_users(write(tmp_path / "users.json", [one]), PAPERS, everyone)
    table = keyed(everyone, PAPERS).with_columns(group=pl.col("user_id"), role=pl.lit("few_shot"))
    assert has_unasked(table)
    found = audit(table, {}, PAPERS)
    assert found["labels"]["items"] is None
    assert found["labels"]["golds"]["shares"] == {"[1]": 1.0, "[2]": 0.0}
    assert found["queries"]["all"]["text"] == {"any": 1, "own": 1, "sibling": 0, "other": 0}


def test_a_side_in_memory_is_written_as_one_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes, row groups too; and a side without users."""
    monkeypatch.setattr(tables, "ROW_GROUP", 100)
    everyone = tmp_path / "everyone.arrow"
    copy_users(users_file(tmp_path, 0), MOVIES, everyone)
    frame = keyed(everyone, MOVIES).with_columns(group=pl.col("user_id")).sort("user_id")
    write_sides(everyone, {"side": frame, "rest": frame[:0]}, tmp_path)
    for name in ("side", "rest"):
        expected = (tmp_path / f"{name}.parquet").read_bytes()
        write_side(read_table(tmp_path / f"{name}.parquet"), tmp_path / "again.parquet")
        assert (tmp_path / "again.parquet").read_bytes() == expected
    assert pq.read_metadata(tmp_path / "side.parquet").num_row_groups > 5


def test_free_text_answers_are_keys_too(tmp_path: Path) -> None:
    titles = get_task("LaMP-5")
    users = [
        {"user_id": name, "profile": [{"id": "1", "abstract": "a", "title": title}]}
        for name, title in (("a", "one title"), ("b", "one title"), ("c", "another"))
    ]
    copy_users(write(tmp_path / "users.json", users), titles, tmp_path / "everyone.arrow")
    items = keyed(tmp_path / "everyone.arrow", titles)["profile"].explode().struct
    first, second, third = items.field("answer").to_list()
    assert first == second != third
    assert items.field("id").to_list() == ["0", "1", "2"]
    assert "title" not in first


def test_a_side_depends_on_its_users_alone(tmp_path: Path) -> None:
    """The bytes of a side's file do not change with the users of the others."""
    found = []
    for number, more in enumerate(([], [user("x", movie("new"), movie("newer"))])):
        folder = tmp_path / str(number)
        folder.mkdir()
        users = [user(name, movie(f"{name} 1"), movie(f"{name} 2")) for name in "cba"]
        copy_users(write(folder / "u.json", [*more, *users]), MOVIES, folder / "everyone.arrow")
        frame = keyed(folder / "everyone.arrow", MOVIES).with_columns(group=pl.col("user_id"))
        side = frame.filter(pl.col("user_id") != "x").sort("user_id")
        write_sides(folder / "everyone.arrow", {"side": side, "rest": frame[:0]}, folder)
        found.append((folder / "side.parquet").read_bytes())
        assert read_table(folder / "rest.parquet").is_empty()
    assert found[0] == found[1]


def test_a_user_is_read_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the footer and the user's row group may be destroyed."""
    monkeypatch.setattr(tables, "ROW_GROUP", 1000)
    names = [f"user {number:03d}" for number in range(100)]
    users = [user(name, *(movie(f"{name} {n}") for n in range(10))) for name in names]
    copy_users(write(tmp_path / "u.json", users), MOVIES, tmp_path / "everyone.arrow")
    frame = keyed(tmp_path / "everyone.arrow", MOVIES).with_columns(group=pl.col("user_id"))
    write_sides(tmp_path / "everyone.arrow", {"side": frame}, tmp_path)
    file = tmp_path / "side.parquet"
    meta = pq.read_metadata(file)
    assert meta.num_row_groups > 5
    assert sum(meta.row_group(n).num_rows for n in range(meta.num_row_groups)) == 100
    whole = read_table(file)
    for chosen in (["user 042"], ["user 099", "user 000"], ["nobody"], []):
        expected = whole.filter(pl.col("user_id").is_in(chosen))
        assert read_table(file, chosen).equals(expected)
    content = bytearray(file.read_bytes())
    for number in range(meta.num_row_groups):
        group = meta.row_group(number)
        bounds = group.column(0).statistics
        if not bounds.min <= "user 042" <= bounds.max:
            start = group.column(0).data_page_offset
            columns = range(group.num_columns)
            size = sum(group.column(n).total_compressed_size for n in columns)
            content[start : start + size] = bytes(size)
    file.write_bytes(content)
    (found,) = read_table(file, ["user 042"]).to_dicts()
    assert [item["text"] for item in found["profile"]] == [f"user 042 {n}" for n in range(10)]
    with pytest.raises(pl.exceptions.ComputeError):
        read_table(file, ["user 099"])


def test_a_row_group_holds_whole_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROW_GROUP", 300)
    users = [user(n, *(movie(f"film {n} {i} " + "x" * 50) for i in range(4))) for n in range(20)]
    everyone = tmp_path / "everyone.arrow"
    copy_users(write(tmp_path / "u.json", users), MOVIES, everyone)
    frame = keyed(everyone, MOVIES).with_columns(group=pl.col("user_id"))
    write_sides(everyone, {"side": frame}, tmp_path)
    parts = list(tables.row_groups(tmp_path / "side.parquet"))
    assert len(parts) > 10  # a user has some 250 characters
    assert pl.concat([pl.DataFrame(pl.from_arrow(part)) for part in parts])[
        "user_id"
    ].to_list() == [str(n) for n in range(20)]

"""Users one by one: what was made for one is found in whatever batch it was made."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tasks.record import File
from tasks.results.remote import Remote
from tasks.results.rows import Rows, known_rows
from tasks.results.store import Store, store
from tests.unit.results.files import flip

STAGE = "stacking"


def read(folder: File) -> list[str]:
    return (store().path(folder) / "rows.txt").read_text().splitlines()


def keep(keys: Sequence[str], rows: Sequence[str], stage: str = STAGE) -> File:
    """Store rows as a stage does."""
    with store().new(stage, keys) as folder:
        (folder.path / "rows.txt").write_text("\n".join(rows))
    return folder.file()


def batch(keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """The rows of a batch of keys, and the keys that were made for it."""
    rows = Rows(STAGE, keys, read)
    made = [keys[number] for number in rows.missing]
    rows.add(f"row of {key}" for key in made)
    assert rows.missing == []
    with rows.folder() as folder:
        (folder.path / "rows.txt").write_text("\n".join(rows.all()))
    return rows.all(), made


def test_a_batch_makes_what_no_batch_has_made(where: Store) -> None:
    assert batch("abc") == (["row of a", "row of b", "row of c"], ["a", "b", "c"])
    assert batch("cda") == (["row of c", "row of d", "row of a"], ["d"])
    assert batch("abcd")[1] == []
    assert batch("da")[0] == ["row of d", "row of a"]


def test_a_key_that_stands_twice_is_made_once_for_its_first_place(where: Store) -> None:
    rows, made = batch(["b", "a", "b", "a"])
    assert rows == ["row of b", "row of a", "row of b", "row of a"]
    assert made == ["b", "a"]


def test_nothing_asked_nothing_made(where: Store) -> None:
    assert batch([]) == ([], [])
    assert known_rows(STAGE, [], read) == {}


def test_more_or_fewer_rows_than_asked_for_are_a_fault(where: Store) -> None:
    with pytest.raises(ValueError, match="zip"):
        Rows(STAGE, ["a", "b"], read).add(["one"])


def test_how_many_are_known_is_said(where: Store) -> None:
    batch("ab")
    assert Rows(STAGE, ["b", "c", "d", "c"], read).counted() == "2 users, 2 known from before"


def test_rows_are_found_in_any_folder_at_any_place(where: Store) -> None:
    keep(["r1", "r2"], ["1", "2"])
    keep(["r3", "r1"], ["3", "another 1"])
    keep(["r0", "r2", "r1"], ["0", "2", "1"])
    assert known_rows(STAGE, ["r0", "r1", "r2", "r3", "r4"], read) == {
        "r1": "1",  # the folder that has most of them
        "r0": "0",
        "r2": "2",
        "r3": "3",
    }


def test_one_folder_is_read_where_it_has_all(where: Store) -> None:
    """However many others have some: each may be large."""
    seen: list[str] = []

    def noted(folder: File) -> list[str]:
        seen.append(folder.uri)
        return read(folder)

    for keys in (["r1"], ["r1", "r2"], ["r2", "r3"]):
        keep(keys, [key.upper() for key in keys])
    whole = keep(["r1", "r2", "r3"], ["R1", "R2", "R3"])
    assert len(known_rows(STAGE, ["r1", "r2", "r3"], noted)) == 3
    assert seen == [whole.uri]


def test_many_keys(where: Store) -> None:
    keys = [f"k{number}" for number in range(40_000)]
    keep(keys, [key.upper() for key in keys])
    assert known_rows(STAGE, keys[::-1], read) == {key: key.upper() for key in keys}


@pytest.mark.parametrize("damage", ["a file", "all of it"])
def test_a_damaged_folder_is_as_if_not_there(where: Store, damage: str) -> None:
    folder = keep(["r1", "r2"], ["1", "2"])
    keep(["r3"], ["3"])
    if damage == "a file":
        flip(where.root / folder.uri / "rows.txt")
    else:
        where.remove(where.root / folder.uri)
    assert known_rows(STAGE, ["r1", "r2", "r3"], read) == {"r3": "3"}
    assert batch(["r1", "r3"]) == (["row of r1", "3"], ["r1"])
    assert known_rows(STAGE, ["r1"], read) == {"r1": "row of r1"}


def test_names_that_cannot_be_read_cost_their_rows(where: Store) -> None:
    folder = keep(["r1"], ["1"])
    keep(["r2"], ["2"])
    with store().new(STAGE) as other:  # has no rows
        (other.path / "file").touch()
    (where.root / folder.uri / "rows.json").write_text('["r1"')
    assert known_rows(STAGE, ["r1", "r2"], read) == {"r2": "2"}
    assert batch(["r1", "r2"]) == (["row of r1", "2"], ["r1"])


NASTY = ["../../x", "/etc/passwd", "..", "a/b", "", "x" * 5000, "\n", "用户", "'; drop table rows"]


def test_any_text_is_a_key_and_none_is_a_path(where: Store, tmp_path: Path) -> None:
    keep(NASTY, [str(number) for number in range(len(NASTY))])
    assert known_rows(STAGE, NASTY, read) == {key: str(n) for n, key in enumerate(NASTY)}
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"rows.txt", "rows.json"}


WRITER = """
import sys
from tests.unit.results.test_rows import batch
for number in range(20):
    rows, made = batch([f"{sys.argv[1]}{number}", f"both{number}"])
    assert rows == [f"row of {sys.argv[1]}{number}", f"row of both{number}"], rows
"""


def test_two_processes_write_at_once(where: Store) -> None:
    two = [subprocess.Popen([sys.executable, "-c", WRITER, name]) for name in ("one", "two")]
    try:
        assert [process.wait(300) for process in two] == [0, 0]
    finally:
        for process in two:
            process.kill()
    keys = [f"{name}{number}" for name in ("one", "two", "both") for number in range(20)]
    assert known_rows(STAGE, keys, read) == {key: f"row of {key}" for key in keys}


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_rows_of_other_machines_are_found(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a machine that has seen none, and by one that has rows of its own."""
    place = request.getfixturevalue("s3") if kind == "s3" else f"memory://{tmp_path.name}/store"
    monkeypatch.setenv("MTA_STORE", place)

    def at(name: str) -> None:
        monkeypatch.setenv("MTA_STORE_CACHE", str(tmp_path / name))

    at("one")
    first = keep(["r1", "r2"], ["1", "2"])
    keep(["r9"], ["9"], stage="evidence")
    at("two")
    assert batch(["r2", "r3"]) == (["2", "row of r3"], ["r3"])
    at("one")
    assert known_rows(STAGE, ["r1", "r3"], read) == {"r1": "1", "r3": "row of r3"}
    # A folder that is half there is as if not there.
    Remote(place).remove(f"{first.uri}/rows.txt")
    at("three")
    assert known_rows(STAGE, ["r1", "r2", "r3"], read) == {"r2": "2", "r3": "row of r3"}


def test_a_folder_at_a_url_is_fetched_for_its_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a million users the others are terabytes: only their names are read."""
    monkeypatch.setenv("MTA_STORE", f"memory://{tmp_path.name}/store")
    monkeypatch.setenv("MTA_STORE_CACHE", str(tmp_path / "one"))
    first, other = keep(["r1"], ["1"]), keep(["r2"], ["2"])
    monkeypatch.setenv("MTA_STORE_CACHE", str(tmp_path / "two"))
    assert known_rows(STAGE, ["r1", "r3"], read) == {"r1": "1"}
    assert (tmp_path / "two" / first.uri).exists()
    assert not (tmp_path / "two" / other.uri).exists()
    late = keep(["r3"], ["3"])
    store().remove(store().root / first.uri)
    assert known_rows(STAGE, ["r1", "r2", "r3"], read) == {"r2": "2", "r3": "3"}
    assert (tmp_path / "two" / late.uri).exists()

"""JSON Lines: one user a line, read as the same users in a list are; faults are told by line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import tasks.lamp.records as records
from tasks.errors import InputError
from tasks.lamp.definitions import TASKS, LampTask, get_task
from tasks.lamp.formats import copy_users, read_users
from tests.unit.lamp.helpers import movie, question, user, write
from tests.unit.lamp.test_mutated_files import good
from tests.unit.lamp.test_records import mutated, outcome, ratings

MOVIES = get_task("LaMP-2M")


def lines(users: list[Any], end: str = "\n") -> bytes:
    return "".join(json.dumps(one, ensure_ascii=False) + end for one in users).encode()


@pytest.mark.parametrize("name", ["users.json", "users.jsonl"])
@pytest.mark.parametrize("task", list(TASKS.values()), ids=list(TASKS))
def test_the_same_users_as_in_a_list(tmp_path: Path, task: LampTask, name: str) -> None:
    """Whatever the file is called, with one thing to drop."""
    users, _ = good(task, "users")
    users[3]["profile"][1][task.text_field] = " "
    expected = read_users(write(tmp_path / "list.json", users), task)
    file = tmp_path / name
    file.write_bytes(lines(users))
    found = read_users(file, task)
    assert found.users.equals(expected.users)
    assert found.dropped == expected.dropped != {}


@pytest.mark.parametrize(
    "content",
    [
        lines(ratings(5), end="\r\n"),
        b"\xef\xbb\xbf" + lines(ratings(5)),
        b"\n \n" + lines(ratings(5), end="\n\n  \t\n"),
        lines(ratings(5)).rstrip(b"\n"),
        b"   " + lines(ratings(5)),
    ],
    ids=["Windows line ends", "byte order mark", "blank lines", "no line end", "spaces"],
)
def test_what_stands_around_lines(tmp_path: Path, content: bytes) -> None:
    expected = outcome(write(tmp_path / "list.json", ratings(5)))
    file = tmp_path / "users.json"
    file.write_bytes(content)
    assert outcome(file) == expected


def test_one_user_alone(tmp_path: Path) -> None:
    file = tmp_path / "users.jsonl"
    file.write_bytes(lines([user(1, movie("one"))]))
    assert read_users(file, MOVIES).users["user_id"].to_list() == ["1"]


ONE = b'{"user_id": 1, "profile": [{"description": "x", "tag": "comedy"}]}\n'


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (ONE + b"\n" + b'{"a": \n', ["line 3: not valid JSON at line 4, column 1 (", "no comma"]),
        (ONE + b'{"a": 1}, {"b": 2}\n', ["line 2 has no user_id"]),
        (ONE[:-2] + ONE, ["line 1: not valid JSON at line 1, column 66 (", "one user a line"]),
        (ONE.rstrip() + b",\n" + ONE, ["line 1, column 67 (Expecting value)", "no comma"]),
        (ONE + b'{"\xc3\xa9": "\xff"}\n', ["line 2: not UTF-8 at byte 75"]),
        (ONE + b'{"a": NaN}\n', ["line 2: cannot be read (NaN is not JSON)"]),
        (ONE + b'{"a": ' + b"[" * 100_000, ["line 2: cannot be read", "recursion"]),
        # A file that mixes: a list after objects, and objects after a list.
        (ONE + b"[" + ONE.rstrip() + b"]\n", ["line 2 is a list", "must be a JSON object"]),
        (b"[" + ONE.rstrip() + b"]\n" + ONE, ["after its list", "line 2, column 1", "Extra data"]),
        (ONE + b"5\n", ["line 2 is a number"]),
        (ONE + b"\n" + ONE, ["line 3 (user_id '1') has the user_id of line 1"]),
        (b'{"task": "LaMP_2", "golds": []}', ["line 1 has no user_id", "one user a line"]),
        (lines([user(n, movie("x"), query=[question("q", "y")]) for n in range(2)]),
         ["line 2", "has the id 'q', which a query of line 1 has too"]),
        (lines([user(5, movie("x"), [])]), ["line 1 (user_id '5'), profile item 1 is a list"]),
    ],
)  # fmt: skip
def test_faults_by_line(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    """By hand: lines and columns count from 1, bytes from 0; ONE has 67 bytes."""
    assert len(ONE) == 67
    file = tmp_path / "users.json"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_users(file, MOVIES)
    line = str(caught.value)
    assert line.startswith(str(file))
    assert "\n" not in line
    for part in parts:
        assert part in line


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST", 1000)
    monkeypatch.setattr(records, "BLOCK", 500)
    file = tmp_path / "users.json"
    file.write_bytes(ONE + b'{"a": "' + b"x" * 2000)
    line = outcome(file, MOVIES)
    assert "line 2: " in line
    assert "does not end within" in line


@pytest.mark.parametrize("seed", range(4))
def test_damaged_lines(tmp_path: Path, seed: int) -> None:
    """Each is read or refused in one line; a copy holds what is read."""
    chance = random.Random(seed)
    file = tmp_path / "users.jsonl"
    read = 0
    for _ in range(60):
        file.write_bytes(mutated(lines(ratings(chance.randint(1, 12))).decode(), chance))
        found = outcome(file)
        if isinstance(found, str):
            assert "\n" not in found
            assert found.startswith(str(file))
        else:
            read += 1
            copied = copy_users(file, get_task("LaMP-3"), tmp_path / "copy.arrow")
            assert copied.dropped == found[1]
    assert 0 < read < 60


def test_the_line_after_a_damaged_one_is_read(tmp_path: Path) -> None:
    """An object that does not end, as it is told at the end of the file, and a byte that is not
    UTF-8 cost their own lines alone."""
    file = tmp_path / "users.jsonl"
    file.write_bytes(b'{"user_id": "\xff"}\n{"user_id": 1, "profile": [\n' + ONE)
    faults: list[InputError] = []
    assert [place for place, _ in records.read_records(file, faults.append)] == ["line 3"]
    assert [str(fault).removeprefix(f"{file}: ").split(";")[0] for fault in faults] == [
        "line 1: not UTF-8 at byte 13",
        "line 2: not valid JSON at line 4, column 1 (Expecting ',' delimiter)",
    ]

"""Reading record by record: the same is kept in blocks of any size."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import tasks.lamp.records as records
from tasks.errors import InputError
from tasks.lamp.definitions import get_task
from tasks.lamp.formats import copy_users, read_users
from tasks.lamp.records import read_records
from tasks.lamp.tables import mapped
from tests.unit.lamp.helpers import write

RATINGS = get_task("LaMP-3")
TITLES = get_task("LaMP-5")


def ratings(count: int, items: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "user_id": f"u{number}",
            "profile": [
                {
                    "text": f"text {number} {n} \u00e9",
                    "score": str(n % 5 + 1),
                    "id": f"{number}-{n}",
                }
                for n in range(items)
            ],
            "query": [{"id": f"q{number}", "input": f"review: new {number}", "gold": "3"}],
        }
        for number in range(count)
    ]


def outcome(file: Path, task: Any = RATINGS) -> Any:
    try:
        loaded = read_users(file, task)
    except InputError as error:
        return str(error)
    return loaded.users.to_dicts(), loaded.dropped


# What may stand in place of a string, and what may be put anywhere.
VALUES = [
    *("5", "5.0", "4.5", "1e0", "-0", "007", "true", "false", "null", "NaN", "-Infinity", "1e999"),
    *('""', '" "', '"\\u001c"', '"5.0"', '"true"', '"-"', '" 4 "', '"\\ud800"', '"\\ud83d\\ude00"'),
    *(
        '"\\ude00\\ud83d"',
        '"a\\\\"',
        '"a\\\\\\": b"',
        '"{\\"text\\": 5}"',
        '"]}, {"',
        "[]",
        '["x"]',
    ),
    *(
        "{}",
        '{"text": "x"}',
        "123456789012345678901234567890",
        '"12345678901234567890"',
        '"\\u0000"',
    ),
]
PIECES = [
    *('"text": "twice", ', '"text" : "spaced", ', '"score":"1", ', '"new": "x", ', '"new" : 5, '),
    *('"id":null,', ",", "]", "}", "{", '"', "\\", "\n", " ", "\x00", "é", "\ufeff"),
]


def mutated(text: str, chance: random.Random) -> bytes:
    """The text with one to three faults or oddities."""
    for _ in range(chance.randint(1, 3)):
        strings = [n for n, c in enumerate(text) if c == '"']
        kind = chance.randrange(6)
        at = chance.randrange(len(text))
        if kind == 0 and len(strings) > 3:
            start = chance.randrange(0, len(strings) - 1)
            text = text[: strings[start]] + chance.choice(VALUES) + text[strings[start + 1] + 1 :]
        elif kind == 1:
            braces = [n + 1 for n, c in enumerate(text) if c == "{"]
            at = chance.choice(braces) if braces else at
            text = text[:at] + chance.choice(PIECES) + text[at:]
        elif kind == 2:
            text = text[:at] + text[at + chance.randint(1, 4) :]
        elif kind == 3:
            end = min(len(text), at + chance.randint(1, 200))
            text = text[:at] + text[at:end] * 2 + text[end:]
        elif kind == 4:
            text = text[:at] + chance.choice(PIECES) + text[at:]
        else:
            text = text.replace(", ", chance.choice([",", " ,\n", ", "]), chance.randint(1, 50))
        if not text:
            return b""
    content = text.encode()
    if chance.random() < 0.1:
        at = chance.randrange(len(content))
        content = content[:at] + b"\xff" + content[at:]
    return content


@pytest.mark.parametrize("seed", range(8))
def test_blocks_of_any_size_keep_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    file = tmp_path / "users.json"
    kept = 0
    for _ in range(60):
        text = json.dumps(
            ratings(chance.randint(1, 12)),
            ensure_ascii=chance.random() < 0.5,
            indent=chance.choice([None, None, 1]),
        )
        file.write_bytes(mutated(text, chance))
        task = chance.choice([RATINGS, TITLES_OF_RATINGS])
        monkeypatch.setattr(records, "BLOCK", 1 << 20)
        expected = outcome(file, task)
        monkeypatch.setattr(records, "BLOCK", chance.choice([50, 300, 1000, 1 << 20]))
        assert outcome(file, task) == expected, file.read_bytes()
        assert "\n" not in expected
        kept += not isinstance(expected, str)
    assert kept > 5  # most are faults; some must be oddities only


# Free text as the answer: nothing is looked up, so what a value was decides.
TITLES_OF_RATINGS = TITLES.__class__(
    **{**TITLES.__dict__, "text_field": "text", "answer_field": "score"}
)


def test_one_unusual_user_among_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "BLOCK", 2000)
    users = ratings(60)
    users[30]["profile"][1]["score"] = 2.0
    users[40]["profile"][2] = users[40]["profile"][1]
    users[50]["profile"][3]["more"] = {"of": ["it"]}
    file = write(tmp_path / "users.json", users)
    loaded = read_users(file, RATINGS)
    assert loaded.users["user_id"].to_list() == [user["user_id"] for user in users]
    assert loaded.users["profile"][30].to_list()[1]["answer"] == "2"
    assert loaded.users["profile"].list.len().sum() == 60 * 4 - 1
    assert sum(loaded.dropped.values()) == 1
    users[55]["profile"][0]["score"] = True
    with pytest.raises(InputError, match=r"record 55 \(user_id 'u55'\), profile item 0: score is"):
        read_users(write(file, users), RATINGS)


def test_a_copy_holds_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same bytes each time."""
    monkeypatch.setattr(records, "BLOCK", 3000)
    users = ratings(80)
    users[10]["profile"] = []
    users[20]["user_id"] = 20
    file = write(tmp_path / "users.json", users)
    loaded = read_users(file, RATINGS)
    copies = [tmp_path / f"{number}.arrow" for number in range(2)]
    for copy in copies:
        found = copy_users(file, RATINGS, copy)
        assert found.dropped == loaded.dropped
        assert mapped(copy).equals(loaded.users)
    assert copies[0].read_bytes() == copies[1].read_bytes()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b'[{"a": 1}, {"a": "\xff"}]', ["record 1", "not UTF-8 at byte 18"]),
        (b'[{"a": 1}, {"a": "x}]', ["record 1", "line 1, column 18 (", "truncated"]),
        (b'[{"a": 1},\n {"a" "and so on"}]', ["record 1", "line 2, column 7 (", "repair"]),
        ('[{"é": 1},\n {"é" "x"}]'.encode(), ["record 1", "line 2, column 7 ("]),
        (b'\xef\xbb\xbf[{"a" 1}]', ["record 0", "line 1, column 7 ("]),
        (b'[{"a": 1}] [', ["after its list", "line 1, column 12 (", "Extra data"]),
        (b'[{"a": 1}, ]', ["record 1", "column 12", "Expecting value"]),
        (b'[{"a": 1} {"a": 2}]', ["record 0", "column 11", "Expecting ','"]),
        (b'[{"a": 1}, {"a": NaN}]', ["record 1", "NaN is not JSON"]),
        (b'[{"a": 1}, ' + b"[" * 100_000, ["record 1", "recursion"]),
        (b'[{"a": 1}, ' + b"1" * 5000 + b"]", ["record 1", "digits"]),
        (b'[{"a": 1}, ', ["record 1", "truncated"]),
        (b"[", ["record 0", "truncated"]),
        (b"", ["is empty"]),
        (b"\xef\xbb\xbf \n", ["is empty"]),
        (b"  [{}, ]  ", ["record 1", "line 1, column 8"]),
        (b'"x"', ["neither a JSON list nor JSON Lines"]),
        (b'{"a": ', ["not valid JSON at line 1, column 7"]),
        (b"<html>", ["web page"]),
        (b"\xff\xfe[\x00", ["not UTF-8 at byte 0"]),
    ],
)
def test_where_a_file_stops_being_json(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    """By hand: characters count from 1; the byte order mark is no character."""
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(read_records(file))
    line = str(caught.value)
    assert line.startswith(str(file))
    assert "\n" not in line
    for part in parts:
        assert part in line


def test_a_record_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing quote would have all that follows taken for one record."""
    monkeypatch.setattr(records, "BLOCK", 500)
    monkeypatch.setattr(records, "LONGEST", 4000)
    text = json.dumps(ratings(100))
    file = tmp_path / "users.json"
    file.write_text(text.replace('"text 7 1', "text 7 1"))
    assert "record 7" in outcome(file)
    file.write_text(text[:4000] + '{"a": "' + "x" * 9000)
    assert "does not end within" in outcome(file) or "not valid JSON" in outcome(file)
    long = ratings(3)
    long[1]["profile"][0]["text"] = "y" * 9000
    line = outcome(write(file, long))
    assert "record 1: " in line
    assert "does not end within" in line


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        list(read_records(tmp_path / "absent.json"))
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory"):
        list(read_records(tmp_path))

"""Damaged files of every task and format: one line that names file and record, or a count.

Each case takes good files, makes one fault in them, at a place drawn by the case's name, and has
`prepare` write a result. Either there is no result at all and one line about the fault, or there is
a whole one and what was left out is counted. pytest-timeout ends a case that hangs.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest

import tasks.lamp.kept as kept
from tasks.config.run import resolve
from tasks.errors import InputError
from tasks.lamp.definitions import TASKS, LampTask
from tasks.lamp.folders import ROLES
from tasks.prepare import prepared_users
from tasks.results.store import store

pytestmark = pytest.mark.timeout(120)

USERS, ITEMS = 9, 4
Records = list[dict[str, Any]]


class Place(NamedTuple):
    """Where a fault is made, and what the data are."""

    task: LampTask
    user: int
    item: int
    name: str  # the field of a user's id


def item(task: LampTask, user: int, number: int) -> dict[str, Any]:
    answer = task.labels[number % len(task.labels)] if task.labels else f"answer {user} {number}"
    if task.name == "LaMP-1":
        answer = f"reference {user} {number}"
    made = {"id": f"{user}-{number}", task.text_field: f"text {user} é {number}"}
    return {**made, task.answer_field: answer, "abstract" if task.name == "LaMP-1" else "more": "x"}


def query(task: LampTask, user: int) -> dict[str, Any]:
    gold = task.labels[0] if task.labels else f"gold {user}"
    return {"id": f"q{user}", "input": f"Ask.{task.marker}something {user}", "gold": gold}


def good(task: LampTask, form: str) -> tuple[Records, Records]:
    """The users or questions, and the golds."""
    users, golds = [], []
    for user in range(USERS):
        profile = [item(task, user, number) for number in range(ITEMS)]
        asked = query(task, user)
        if form == "users":
            users.append({"user_id": f"u{user}", "profile": profile, "query": [asked]})
        else:
            users.append({"id": f"u{user}", "input": asked["input"], "profile": profile})
            golds.append({"id": f"u{user}", "output": asked["gold"]})
    return users, golds


# Faults in the values. Each changes the records in place.
Fault = Callable[[Records, Place], None]


def put(path: str, value: Any) -> Fault:
    """Put a value at `user`, `user.field`, `item`, `item.field` or `query.field`."""

    def fault(users: Records, at: Place) -> None:
        holder: Any = users
        key: Any = at.user
        kind, _, field = path.partition(".")
        if kind in ("item", "query") or field:
            holder = users[at.user]
            key = {"id": at.name}.get(field, field)
        if kind == "item":
            holder, key = holder["profile"], at.item
        if kind == "query":
            holder, key = holder["query"], 0
        if kind in ("item", "query") and field:
            holder = holder[key]
            key = {"text": at.task.text_field, "answer": at.task.answer_field}.get(field, field)
        if value is MISSING:
            del holder[key]
        else:
            holder[key] = value

    return fault


MISSING = object()


def again(users: Records, at: Place) -> None:
    users[at.user][at.name] = users[at.user - 1][at.name]


def item_twice(users: Records, at: Place) -> None:
    users[at.user]["profile"].append(dict(users[at.user]["profile"][at.item], id="again"))


def query_id_twice(users: Records, at: Place) -> None:
    users[at.user]["query"][0]["id"] = users[at.user - 1]["query"][0]["id"]


class Case(NamedTuple):
    """A fault; in which forms and for which tasks; and what is to come of it.

    expected: a pattern of the line ({user}, {item} are filled in), a reason that is counted, or
    None where the data are good all the same.
    """

    fault: Fault
    expected: str | None
    forms: tuple[str, ...] = ("users", "official")
    only: Callable[[LampTask], bool] = lambda task: True


def labelled(task: LampTask) -> bool:
    return bool(task.labels) and task.name != "LaMP-1"


def free(task: LampTask) -> bool:
    return not task.labels


ITEM = r"record {user} \(.*\), profile item {item}"
COUNTED = (kept.EMPTY_ITEM, kept.EMPTY_USER, kept.EMPTY_QUERY, kept.DUPLICATE_ITEM,
           kept.UNKNOWN_LABEL, kept.UNKNOWN_GOLD)  # fmt: skip
VALUES: dict[str, Case] = {
    "user is a number": Case(put("user", 5), "record {user}( is|:)"),
    "user is null": Case(put("user", None), "record {user} is null"),
    "user is a list": Case(put("user", []), "record {user} is a list"),
    "user is a string": Case(put("user", "u"), "record {user} is a string"),
    "no id": Case(put("user.id", MISSING), "record {user} has no"),
    "id is null": Case(put("user.id", None), "record {user}: .*id is empty"),
    "id is blank": Case(put("user.id", " \n"), "record {user}: .*id is empty"),
    "id is true": Case(put("user.id", True), "record {user}: .*id is true or false"),
    "id is a list": Case(put("user.id", ["u"]), "record {user}: .*id is a list"),
    "id is a number": Case(put("user.id", 77), None, ("users",)),
    "id stands twice": Case(again, "record {user} .* of record {before}"),
    "no profile": Case(put("user.profile", MISSING), r"record {user} \(.*\) has no profile"),
    "profile is null": Case(put("user.profile", None), r"record {user} \(.*\): profile is null"),
    "profile is an object": Case(put("user.profile", {}), r"record {user} \(.*\): profile is a"),
    "profile is a string": Case(put("user.profile", "x"), r"record {user} \(.*\): profile is a"),
    "profile is empty": Case(put("user.profile", []), kept.EMPTY_USER),
    "item is null": Case(put("item", None), ITEM + " is null"),
    "item is a number": Case(put("item", 1.5), ITEM + " is a number"),
    "item is a string": Case(put("item", "x"), ITEM + " is a string"),
    "item is a list": Case(put("item", [{}]), ITEM + " is a list"),
    "item is an empty object": Case(put("item", {}), ITEM + " has no"),
    "item without text": Case(put("item.text", MISSING), ITEM + " has no"),
    "item without answer": Case(put("item.answer", MISSING), ITEM + " has no"),
    "item of an empty id": Case(put("item.id", ""), ITEM + ": id is empty"),
    "item of an id that is null": Case(put("item.id", None), ITEM + ": id is empty"),
    "item without id": Case(put("item.id", MISSING), None),
    "text is null": Case(put("item.text", None), kept.EMPTY_ITEM),
    "text is empty": Case(put("item.text", ""), kept.EMPTY_ITEM),
    "text is blank": Case(put("item.text", "\u2003\x1c\n"), kept.EMPTY_ITEM),
    "text is a list": Case(put("item.text", ["x"]), ITEM + ": .* is a list"),
    "text is an object": Case(put("item.text", {"x": 1}), ITEM + ": .* is a JSON object"),
    "text is false": Case(put("item.text", False), ITEM + ": .* is true or false"),
    "text is a number": Case(put("item.text", 12), None),
    "text is infinite": Case(put("item.text", float("inf")), "record {user}: .*Infinity is not"),
    "text is NaN": Case(put("item.text", float("nan")), "record {user}: .*NaN is not JSON"),
    "text is half a character": Case(put("item.text", "a \udc00 b"), ITEM + ": .*half a character"),
    "text is huge": Case(put("item.text", "long " * 400_000), None),
    "text holds JSON": Case(put("item.text", '"]}, {"user_id": "x", "profile": []}'), None),
    "text holds escapes": Case(put("item.text", '\\" \\\\ \x00 \u2028 \U0001f600 ": '), None),
    "answer is null": Case(put("item.answer", None), kept.EMPTY_ITEM),
    "answer is a list": Case(put("item.answer", [1]), ITEM + ": .* is a list"),
    "answer is true": Case(put("item.answer", True), ITEM + ": .* is true or false"),
    "answer unknown": Case(put("item.answer", "none"), kept.UNKNOWN_LABEL, only=labelled),
    "answer is huge": Case(put("item.answer", "long " * 100_000), None, only=free),
    "item stands twice": Case(item_twice, kept.DUPLICATE_ITEM),
    "more fields": Case(put("item.new", {"a": [1, {"b": None}]}), None),
    "too deep": Case(put("item.new", "DEEP"), "record {user}: .*recursion"),
    "query is null": Case(put("user.query", None), r"record {user} \(.*\): query is", ("users",)),
    "query is an object": Case(put("user.query", {}), r"record {user} \(.*\): query", ("users",)),
    "query is a number": Case(put("query", 3), "record {user} .*, query 0 is", ("users",)),
    "query without gold": Case(put("query.gold", MISSING), "record {user} .*, query 0", ("users",)),
    "query of no id": Case(put("query.id", None), "record {user} .*, query 0: id", ("users",)),
    "query id stands twice": Case(query_id_twice, "record {user} .*record {before}", ("users",)),
    "query is empty": Case(put("query.input", " "), kept.EMPTY_QUERY, ("users",)),
    "gold is null": Case(put("query.gold", None), kept.EMPTY_QUERY, ("users",)),
    "gold is an object": Case(put("query.gold", {}), "record {user} .*, query 0: gold", ("users",)),
    "gold unknown": Case(
        put("query.gold", "none"), kept.UNKNOWN_GOLD, ("users",), lambda task: bool(task.labels)
    ),
    "no query": Case(put("user.query", MISSING), None, ("users",)),
    "no input": Case(put("user.input", MISSING), "record {user} .*has no 'input'", ("official",)),
    "input is a list": Case(put("user.input", []), "record {user} .*: input is", ("official",)),
    "id without gold": Case(put("user.id", "x"), "record {user} .* has no gold", ("official",)),
}  # fmt: skip


def value_cases() -> list[Any]:
    """Each case in each of its forms, for three tasks."""
    found = []
    for name, case in VALUES.items():
        possible = [task for task in TASKS.values() if case.only(task)]
        for form in case.forms:
            for task in random.Random(f"{name} {form}").sample(possible, min(3, len(possible))):
                found.append(pytest.param(task, form, case, id=f"{task.name}-{form}-{name}"))
    return found


def write(folder: Path, form: str, users: Any, golds: Any) -> Path:
    """The files of one form; the one with the users is returned."""
    file = folder / ("users.json" if form == "users" else "dev_questions.json")
    text = json.dumps(users, ensure_ascii=False).replace('"DEEP"', "[" * 50_000 + "]" * 50_000)
    file.write_bytes(text.encode("utf-8", "surrogatepass").replace(b"\xed\xb0\x80", b"\\udc00"))
    if form == "official":
        (folder / "dev_outputs.json").write_text(json.dumps({"task": "LaMP", "golds": golds}))
    return file


class Outcome(NamedTuple):
    line: str | None
    dropped: dict[str, int]
    users: int


def outcome(folder: Path, data: Path, task: LampTask) -> Outcome:
    """What `prepare` makes of it: a whole result, or a line and nothing at all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTA_STORE", str(folder / "store"))
        split = {"base_candidates": False}
        given = {"data": str(data), "anchors": {"min_items": 1}, "split": split}
        config = resolve(given).for_task(task.name, 0)
        try:
            made = prepared_users(config)
        except InputError as error:
            left = [path for path in (folder / "store").rglob("*") if path.is_file()]
            assert left == []
            return Outcome(str(error), {}, 0)
        sizes = [pl.read_parquet(store().path(made.side(role))).height for role in ROLES]
        names = {path.name for path in (store().root / made.base.folder).iterdir()}
    assert names == {"pooled.parquet", *(f"{role}.parquet" for role in ROLES)}
    return Outcome(None, made.dropped, sum(sizes))


def check(found: Outcome, expected: str | None, file: Path) -> None:
    if expected is None or expected in COUNTED:
        assert found.line is None
        assert found.users >= USERS - 1
        assert found.dropped.get(expected, 0) >= 1 if expected else found.dropped == {}
        return
    assert found.line is not None
    assert "\n" not in found.line
    assert len(found.line) < 400
    assert found.line.startswith(str(file)), found.line
    assert re.search(expected, found.line.removeprefix(str(file))), found.line


@pytest.mark.parametrize(("task", "form", "case"), value_cases())
def test_a_value_that_is_wrong(
    tmp_path: Path, request: pytest.FixtureRequest, task: LampTask, form: str, case: Case
) -> None:
    chance = random.Random(request.node.name)
    name = "user_id" if form == "users" else "id"
    place = Place(task, chance.randrange(1, USERS), chance.randrange(ITEMS), name)
    users, golds = good(task, form)
    case.fault(users, place)
    file = write(tmp_path, form, users, golds)
    expected = case.expected
    if expected and expected not in COUNTED:
        expected = expected.format(user=place.user, item=place.item, before=place.user - 1)
    found = outcome(tmp_path, file if form == "users" else tmp_path, task)
    check(found, expected, file)


# Faults in the bytes: of the file that holds users, or of the outputs.
def truncated(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(3, len(content) - 1)]


def not_utf8(content: bytes, chance: random.Random) -> bytes:
    at = chance.choice([found.start() for found in re.finditer(rb"[a-z]", content)])
    return content[:at] + chance.choice([b"\xff", b"\xc3", b"\xed\xa0\x80"]) + content[at:]


def without(characters: bytes) -> Callable[[bytes, random.Random], bytes]:
    def fault(content: bytes, chance: random.Random) -> bytes:
        places = [n for n, c in enumerate(content[:-1]) if c in characters and n]
        at = chance.choice(places)
        return content[:at] + content[at + 1 :]

    return fault


def insert(piece: bytes) -> Callable[[bytes, random.Random], bytes]:
    def fault(content: bytes, chance: random.Random) -> bytes:
        at = chance.choice([found.start() for found in re.finditer(rb", ", content)])
        return content[:at] + piece + content[at:]

    return fault


PLACED = r"(record|gold) \d+|line \d+, column \d+"
BYTES: dict[str, tuple[Callable[[bytes, random.Random], bytes], str | None]] = {
    **{f"truncated {n}": (truncated, PLACED) for n in range(4)},
    **{f"not UTF-8 {n}": (not_utf8, r"not UTF-8 at byte \d+") for n in range(3)},
    "a quote is missing": (without(b'"'), PLACED),
    "a bracket is missing": (without(b"[{"), PLACED),
    "a closing bracket is missing": (without(b"}"), PLACED),
    "a colon is missing": (without(b":"), PLACED),
    "a NUL": (insert(b"\x00"), PLACED),
    "a second comma": (insert(b","), PLACED),
    "a comment": (insert(b" // note"), PLACED),
    "something after it": (lambda content, _: content + b" and more", "not valid JSON"),
    "twice": (lambda content, _: content * 2, "Extra data|no list"),
    "a web page": (lambda content, _: b"<!DOCTYPE html><html>404</html>", "web page"),
    "empty": (lambda content, _: b"", "is empty"),
    "blank": (lambda content, _: b" \n" * 9, "is empty"),
    "compressed": (lambda content, _: gzip.compress(content), "compressed"),
    "UTF-16": (lambda content, _: content.decode().encode("utf-16"), "not UTF-8 at byte 0"),
    "a byte order mark": (lambda content, _: b"\xef\xbb\xbf" + content, None),
    "white space around it": (lambda content, _: b"\n\n " + content + b"\r\n", None),
    "Windows line ends": (lambda content, _: content.replace(b", ", b",\r\n"), None),
}


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("file", ["users.json", "dev_questions.json", "dev_outputs.json"])
def test_bytes_that_are_wrong(tmp_path: Path, file: str, name: str) -> None:
    chance = random.Random(f"{file} {name}")
    task = chance.choice(list(TASKS.values()))
    form = "users" if file == "users.json" else "official"
    users = write(tmp_path, form, *good(task, form))
    damaged = tmp_path / file
    fault, expected = BYTES[name]
    damaged.write_bytes(fault(damaged.read_bytes(), chance))
    found = outcome(tmp_path, users if form == "users" else tmp_path, task)
    check(found, expected, damaged)


@pytest.mark.parametrize(
    "content", ["[]", "{}", "5", '"x"', "null", "[[]]", "[null]", '[{"a": 1}]']
)
@pytest.mark.parametrize("file", ["users.json", "dev_questions.json", "dev_outputs.json"])
def test_json_of_another_kind(tmp_path: Path, file: str, content: str) -> None:
    task = TASKS["LaMP-3"]
    form = "users" if file == "users.json" else "official"
    users = write(tmp_path, form, *good(task, form))
    (tmp_path / file).write_text(content)
    found = outcome(tmp_path, users if form == "users" else tmp_path, task)
    check(found, 'record 0|line 1 has no|holds|has no list "golds"', tmp_path / file)


@pytest.mark.parametrize(
    ("golds", "expected"),
    [
        ([{"id": "u0"}], "gold 0 has no 'output'"),
        ([{"output": "1"}], "gold 0 has no 'id'"),
        (["x"], "gold 0 is a string"),
        ([{"id": None, "output": "1"}], "gold 0: id is empty"),
        ([{"id": "u0", "output": []}], "gold 0: output is a list"),
        ([{"id": "u0", "output": "1"}] * 2, "gold 1 has the id"),
        ([{"id": f"u{n}", "output": "1"} for n in range(USERS + 1)], "'u9' has no question"),
        ({"u0": "1"}, "golds is a JSON object; it must be a list"),
        (None, "golds is null; it must be a list"),
    ],
)
def test_golds_that_are_wrong(tmp_path: Path, golds: Any, expected: str) -> None:
    write(tmp_path, "official", good(TASKS["LaMP-3"], "official")[0], golds)
    check(outcome(tmp_path, tmp_path, TASKS["LaMP-3"]), expected, tmp_path / "dev_outputs.json")


@pytest.mark.parametrize("form", ["users", "official"])
@pytest.mark.parametrize("task", list(TASKS.values()), ids=list(TASKS))
def test_the_files_are_good_before(tmp_path: Path, task: LampTask, form: str) -> None:
    file = write(tmp_path, form, *good(task, form))
    found = outcome(tmp_path, file if form == "users" else tmp_path, task)
    assert found == Outcome(None, {}, USERS)

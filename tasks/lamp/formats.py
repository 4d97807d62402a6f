"""Read LaMP data in its two formats, check it, and count what is dropped.

User file (OPPU, Per-Pcs, MTA): a list of {user_id, profile: [item], query: [{id, input, gold}]},
or JSON Lines, one such user a line.
LaMP official: `{split}_questions.json`, a list of {id, input, profile: [item]}, and
`{split}_outputs.json`, {task, golds: [{id, output}]}; each question is a user of its own.

    loaded = read_users(Path("data/lamp2m"), get_task("LaMP-2M"))        users in memory
    found = copy_users(Path("data/lamp3"), get_task("LaMP-3"), file)     as parquet, however many

Files are read record by record (tasks/lamp/records.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from tasks.errors import InputError
from tasks.lamp.checks import fields_of, identifier, kind, read_json, short
from tasks.lamp.definitions import LampTask
from tasks.lamp.folders import find_files
from tasks.lamp.json_lines import is_lines, read_lines
from tasks.lamp.kept import EMPTY_USER, NO_NEGATIVE, ORPHAN_QUERY, Kept
from tasks.lamp.papers import read_papers
from tasks.lamp.records import read_records
from tasks.lamp.tables import USERS, Records, Rows, parquet


@dataclass(frozen=True)
class Found:
    """What was read besides the users.

    dropped: reason -> how many items, queries or users. sources: the files that were read.
    drawn: papers of LaMP-1 with several citations, of which one was drawn.
    """

    dropped: dict[str, int]
    sources: list[str]
    drawn: int


@dataclass(frozen=True)
class Loaded(Found):
    """Users as read.

    users: columns user_id, role (base, anchor, few_shot, or null where the data does not say),
        profile (list of {id, text, answer}) and query (list of {id, input, gold}), all strings,
        one row per user in the order of the files.
    """

    users: pl.DataFrame


def read_users(path: Path | str, task: LampTask, seed: int = 0) -> Loaded:
    """Read the users of one LaMP task into memory.

    path: a user file; or a folder with user files by role (`folders.ROLE_FILE_NAMES`), with one
    user file, or with LaMP's official questions and outputs (dev if it is there, else train).
    seed: draws the citation of a LaMP-1 paper that names several.
    Empty and repeated items, and labels that the task does not have, are dropped and counted.
    Raises InputError for anything that does not have the format's shape.
    """
    tables: list[pa.Table] = []
    found = _read(Path(path), _Reader(task, Rows(tables.append), seed))
    users = pl.DataFrame(pl.from_arrow(pa.concat_tables([USERS.empty_table(), *tables])))
    return Loaded(**vars(found), users=users)


def copy_users(path: Path | str, task: LampTask, to: Path, seed: int = 0) -> Found:
    """Read users as `read_users` does, and write them to the parquet file `to` meanwhile.

    Memory holds a few megabytes of users, whatever the size of the files, and the golds of LaMP's
    official files. The parquet file is not compressed: it is read once, and zstd would take as long
    as reading does. An error leaves an unfinished file.
    """
    with parquet(to, USERS, compression="none") as write:
        return _read(Path(path), _Reader(task, Rows(write), seed))


def _read(path: Path, reader: _Reader) -> Found:
    files = find_files(path)
    for role, file in files.users:
        reader.add_user_file(file, role)
    if files.official:
        reader.add_official(*files.official)
    reader.rows.flush()
    kept = reader.kept
    return Found(dict(sorted(kept.dropped.items())), reader.sources, reader.drawn)


class _Reader:
    """Checks the users of one or more files, and hands them to `rows`."""

    def __init__(self, task: LampTask, rows: Rows, seed: int) -> None:
        self.task = task
        self.rows = rows
        self.seed = seed
        self.drawn = 0
        self.kept = Kept(task)
        self.sources: list[str] = []
        self.unit = "record"  # of the present file: record of a list, or line

    def add_user_file(self, file: Path, role: str | None) -> None:
        users: dict[str, int] = {}
        queries: dict[str, int] = {}
        for index, record in self._records(file):
            where = f"{file}: {self.unit} {index}"
            if not isinstance(record, dict):
                raise InputError(f"{where} is {kind(record)}; a user must be a JSON object")
            if "user_id" not in record:
                hint = "give every user its user_id"
                if self.unit == "line":
                    hint += ", as one user a line or as a JSON list of users"
                if "input" in record:
                    hint = "these are LaMP's own questions: give the folder that holds them"
                raise InputError(f"{where} has no user_id; {hint}")
            user_id = identifier(record["user_id"], where, "user_id")
            where += f" (user_id {short(user_id)})"
            if user_id in users:
                raise InputError(
                    f"{where} has the user_id of {self.unit} {users[user_id]}; merge the two or "
                    "give each its own"
                )
            users[user_id] = index
            asked = self._asked(record.get("query", []), queries, where, index)
            self._add(user_id, role, record, asked, where)
        self.sources.append(str(file))

    def add_official(self, questions_file: Path, outputs_file: Path) -> None:
        if not outputs_file.is_file():
            raise InputError(f"{outputs_file}: not there; {questions_file.name} needs its golds")
        golds = self._read_golds(outputs_file)
        seen: dict[str, int] = {}
        for index, record in self._records(questions_file):
            where = f"{questions_file}: {self.unit} {index}"
            fields = fields_of(record, where, ("id", "input"), self.task.name)
            user_id = identifier(record["id"], where, "id")
            where += f" (id {short(user_id)})"
            if user_id in seen:
                raise InputError(
                    f"{where} has the id of {self.unit} {seen[user_id]}; ids must differ"
                )
            seen[user_id] = index
            if user_id not in golds:
                raise InputError(
                    f"{where} has no gold in {outputs_file.name}; get both files of one split"
                )
            self._add(user_id, None, record, [(user_id, fields["input"], golds[user_id])], where)
        for gold_id in golds:
            if gold_id not in seen:
                raise InputError(
                    f"{outputs_file}: the gold with id {short(gold_id)} has no question in "
                    f"{questions_file.name}; get both files of one split"
                )
        self.sources += [str(questions_file), str(outputs_file)]

    def _records(self, file: Path) -> Iterator[tuple[int, Any]]:
        lines = is_lines(file)
        self.unit = "line" if lines else "record"
        return read_lines(file) if lines else read_records(file)

    def _asked(
        self, given: Any, seen: dict[str, int], where: str, index: int
    ) -> list[tuple[str, str, str]]:
        """A user's queries as (id, input, gold). seen: query id -> record, of all users so far."""
        if not isinstance(given, list):
            raise InputError(f"{where}: query is {kind(given)}; it must be a list")
        checked = []
        for number, query in enumerate(given):
            place = f"{where}, query {number}"
            fields = fields_of(query, place, ("id", "input", "gold"), self.task.name)
            query_id = identifier(query["id"], place, "id")
            # Predictions are matched to golds by query id alone (LaMP's rule).
            if query_id in seen:
                raise InputError(
                    f"{place} has the id {short(query_id)}, which a query of {self.unit} "
                    f"{seen[query_id]} has too; give every query its own id"
                )
            seen[query_id] = index
            checked.append((query_id, fields["input"], fields["gold"]))
        return checked

    def _read_golds(self, file: Path) -> dict[str, str]:
        content = read_json(file)
        records = content.get("golds") if isinstance(content, dict) else None
        if not isinstance(records, list):
            raise InputError(f'{file}: has no list "golds"; expected LaMP\'s own outputs file')
        golds: dict[str, str] = {}
        for index, record in enumerate(records):
            where = f"{file}: gold {index}"
            output = fields_of(record, where, ("id", "output"), self.task.name)["output"]
            gold_id = identifier(record["id"], where, "id")
            if gold_id in golds:
                raise InputError(f"{where} has the id {short(gold_id)} of an earlier gold")
            golds[gold_id] = output
        return golds

    def _add(
        self,
        user_id: str,
        role: str | None,
        record: dict[str, Any],
        asked: list[tuple[str, str, str]],
        where: str,
    ) -> None:
        profile, queries = self._profile(record, where), self.kept.queries(asked)
        if profile.ids:
            self.rows.add(user_id, role, profile, queries)
            return
        self.kept.dropped[EMPTY_USER] += 1
        if queries.ids:
            self.kept.dropped[ORPHAN_QUERY] += len(queries.ids)

    def _profile(self, record: dict[str, Any], where: str) -> Records:
        """A user's usable items."""
        if "profile" not in record:
            raise InputError(f"{where} has no profile; every user needs its list of items")
        items = record["profile"]
        if not isinstance(items, list):
            raise InputError(f"{where}: profile is {kind(items)}; it must be a list")
        if self.task.items == "built":
            papers = read_papers(items, where, self.task.name, self.seed)
            items = papers.items
            self.drawn += papers.drawn
            if papers.lost:
                self.kept.dropped[NO_NEGATIVE] += papers.lost
        names = (self.task.text_field, self.task.answer_field)
        read = []
        for number, item in enumerate(items):
            place = f"{where}, profile item {number}"
            fields = fields_of(item, place, names, self.task.name)
            # Items are told apart by content; an id is only carried along.
            item_id = identifier(item["id"], place, "id") if "id" in item else str(number)
            read.append((item_id, fields[names[0]], fields[names[1]]))
        return self.kept.items(read)

"""Reads LaMP data in the two formats that exist, checks it, and counts what it leaves out.

User file (OPPU, Per-Pcs, MTA): a list of {user_id, profile: [item], query: [{id, input, gold}]},
or JSON Lines, one such user a line.
LaMP official: `{split}_questions.json`, a list of {id, input, profile: [item]}, and
`{split}_outputs.json`, {task, golds: [{id, output}]}; each question is a user of its own.

    loaded = read_users(Path("data/lamp2m"), get_task("LaMP-2M"))        users in memory
    found = copy_users(Path("data/lamp3"), get_task("LaMP-3"), file)     as parquet, however many

Either way files are read record by record (tasks/lamp/records.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
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
from tasks.lamp.usual import Block, Usual

PROFILE_TYPE = pl.List(pl.Struct({"id": pl.String, "text": pl.String, "answer": pl.String}))
QUERY_TYPE = pl.List(pl.Struct({"id": pl.String, "input": pl.String, "gold": pl.String}))
USERS_SCHEMA = {
    "user_id": pl.String(),
    "role": pl.String(),
    "profile": PROFILE_TYPE,
    "query": QUERY_TYPE,
}

# A user's id, queries as (id, input, gold), and how an error names the user.
Head = tuple[str, list[tuple[str, str, str]], str]


@dataclass(frozen=True)
class Found:
    """What was read.

    dropped: how many items, queries and users were left out, by reason; no zeros.
    sources: the files that were read.
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
    """Read the users of one LaMP task.

    path: a user file; or a folder with role-named user files (`folders.ROLE_FILE_NAMES`), with one
    user file alone, or with LaMP's official questions and outputs (dev if it is there, else train).
    seed: decides which citation a paper of LaMP-1 is asked about that names several.
    Empty and repeated items, and labels that the task does not have, are dropped and counted.
    Raises InputError, in one line, for anything that does not have the format's shape.
    """
    tables: list[pa.Table] = []
    found = _read(Path(path), _Reader(task, Rows(tables.append), seed))
    users = pl.DataFrame(schema=USERS_SCHEMA)
    if tables:
        users = pl.concat([pl.DataFrame(pl.from_arrow(table)) for table in tables])
    return Loaded(**vars(found), users=users)


def copy_users(path: Path | str, task: LampTask, to: Path, seed: int = 0) -> Found:
    """As `read_users`, with the users written to a parquet file `to` as they are read.

    Memory holds a few row groups (tasks/lamp/tables.py) and a few blocks, whatever `path` holds;
    of LaMP's official files, the golds too. The file is not compressed: it is there to be split,
    and zstd would take as long as reading does. An error leaves an unfinished file.
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
    """Checks users from one or more files and passes them on."""

    def __init__(self, task: LampTask, rows: Rows, seed: int) -> None:
        self.task = task
        self.rows = rows
        self.seed = seed
        self.drawn = 0
        self.kept = Kept(task)
        self.sources: list[str] = []
        self.unit = "record"  # what the file that is read is a list of

    def add_user_file(self, file: Path, role: str | None) -> None:
        users: dict[str, int] = {}
        queries: dict[str, int] = {}

        def head(record: Any, index: int) -> Head:
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
            return user_id, self._asked(record.get("query", []), queries, where, index), where

        self._add_file(file, role, ("user_id",), head)
        self.sources.append(str(file))

    def _asked(
        self, given: Any, seen: dict[str, int], where: str, index: int
    ) -> list[tuple[str, str, str]]:
        """A user's queries as (id, input, gold). seen: the record of each query's id so far."""
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

    def add_official(self, questions_file: Path, outputs_file: Path) -> None:
        if not outputs_file.is_file():
            raise InputError(f"{outputs_file}: not there; {questions_file.name} needs its golds")
        golds = self._read_golds(outputs_file)
        seen: dict[str, int] = {}

        def head(record: Any, index: int) -> Head:
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
            return user_id, [(user_id, fields["input"], golds[user_id])], where

        self._add_file(questions_file, None, ("id", "input"), head)
        for gold_id in golds:
            if gold_id not in seen:
                raise InputError(
                    f"{outputs_file}: the gold with id {short(gold_id)} has no question in "
                    f"{questions_file.name}; get both files of one split"
                )
        self.sources += [str(questions_file), str(outputs_file)]

    def _add_file(
        self,
        file: Path,
        role: str | None,
        asked: tuple[str, ...],
        head: Callable[[Any, int], Head],
    ) -> None:
        """All users of a file. head: what of a record, by its index, is not its profile."""
        lines = is_lines(file)
        self.unit = "line" if lines else "record"
        # Papers become questions first, and that is not for columns.
        usual = None if lines or self.task.items == "built" else Usual(self.task, *asked)
        for first, records in read_lines(file) if lines else read_records(file, usual):
            if isinstance(records, Block):
                users = enumerate(records.users.to_dicts(), first)
                self._add_block(records, role, [head(user, index) for index, user in users])
                continue
            for index, record in enumerate(records, first):
                user_id, queries, where = head(record, index)
                self._add(user_id, role, self._profile(record, where), queries)
                if usual:
                    usual.learn(record)

    def _add_block(self, block: Block, role: str | None, heads: list[Head]) -> None:
        columns = (block.ids, block.texts, block.answers)
        if block.clean:
            queries = [self.kept.queries(asked) for _, asked, _ in heads]
            user_ids = [user_id for user_id, _, _ in heads]
            self.rows.add_block(user_ids, role, block.lengths, columns, queries)
            return
        items = zip(*(column.to_list() for column in columns), strict=True)
        for (user_id, asked, _), length in zip(heads, block.lengths.tolist(), strict=True):
            self._add(user_id, role, self.kept.items(islice(items, length)), asked)

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
        self, user_id: str, role: str | None, profile: Records, asked: list[tuple[str, str, str]]
    ) -> None:
        queries = self.kept.queries(asked)
        if profile.ids:
            self.rows.add(user_id, role, profile, queries)
            return
        self.kept.dropped[EMPTY_USER] += 1
        if queries.ids:
            self.kept.dropped[ORPHAN_QUERY] += len(queries.ids)

    def _profile(self, record: dict[str, Any], where: str) -> Records:
        """A user's items, checked one by one."""
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

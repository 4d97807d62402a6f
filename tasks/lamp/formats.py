"""Read LaMP data in its two formats, check it, and count what is dropped.

User file (OPPU, Per-Pcs, MTA): a list of {user_id, profile: [item], query: [{id, input, gold}]},
or JSON Lines, one such user a line.
LaMP official: `{split}_questions.json`, a list of {id, input, profile: [item]}, and
`{split}_outputs.json`, {task, golds: [{id, output}]}; each question is a user of its own.

    loaded = read_users(Path("data/lamp2m"), get_task("LaMP-2M"))        users in memory
    found = copy_users(Path("data/lamp3"), get_task("LaMP-3"), file)     in a file, however many
    users, faults = read_histories(Path("user.json"), task)              those that can be read
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from tasks.errors import InputError
from tasks.lamp import kept
from tasks.lamp.citations import UNASKED, read_papers
from tasks.lamp.definitions import LampTask
from tasks.lamp.folders import UserFile, find_files
from tasks.lamp.records import fields_of, item_fields, list_of, read_records, short
from tasks.lamp.tables import ROW_GROUP, USERS, lists

# An item or query of the user of that number: text and answer, or input and gold.
ROW = {"user": pl.UInt32, "id": pl.String, "text": pl.String, "answer": pl.String}
Row = tuple[int, str, str, str]


@dataclass(frozen=True)
class Found:
    """What was read besides the users.

    dropped: reason -> how many items, queries or users. drawn: papers of LaMP-1 with several
    citations, of which one was drawn.
    """

    dropped: dict[str, int]
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
    tables = [USERS.empty_table()]
    found = _read(Path(path), _Reader(task, tables.append, seed))
    return Loaded(**vars(found), users=pl.DataFrame(pl.from_arrow(pa.concat_tables(tables))))


def copy_users(path: Path | str, task: LampTask, to: Path, seed: int = 0) -> Found:
    """Read users as `read_users` does, and write them to the Arrow file `to` meanwhile.

    Memory holds a few megabytes of users, whatever the size of the files, and the golds of LaMP's
    official files. `tables.mapped` reads the file. An error leaves an unfinished file.
    """
    with pa.ipc.new_file(str(to), USERS) as file:
        return _read(Path(path), _Reader(task, file.write_table, seed))


@dataclass(frozen=True)
class History:
    """A user's history: the items that can be used, {id, text, answer}, of so many `given`."""

    user_id: str
    profile: list[dict[str, str]]
    given: int


def read_histories(
    file: Path, task: LampTask, seed: int = 0
) -> tuple[list[History], list[InputError]]:
    """The users of a user file in their order, and what is wrong with those that cannot be read.

    Each user is read without regard to the others, and queries are not looked at. Items are checked
    and dropped as by `read_users`. A file that cannot be read to its end is one fault more.
    """
    tables, faults = [USERS.empty_table()], list[InputError]()
    reader = _Reader(task, tables.append, seed)
    given: dict[str, int] = {}
    places: dict[str, str] = {}
    try:
        for place, record in read_records(file, faults.append):
            try:
                user_id = reader.take(record, file, place, places)
                given[user_id] = len(record["profile"])
            except InputError as error:
                faults.append(error)
    except InputError as error:
        faults.append(error)
    reader.flush()
    rows = pl.DataFrame(pl.from_arrow(pa.concat_tables(tables))).select("user_id", "profile")
    usable = dict(rows.iter_rows())
    return [History(name, usable.get(name, []), count) for name, count in given.items()], faults


def _read(path: Path, reader: _Reader) -> Found:
    for file in find_files(path):
        reader.read(file)
    reader.flush()
    dropped = {reason: count for reason, count in sorted(reader.dropped.items()) if count}
    return Found(dropped, reader.drawn)


def _read_golds(file: Path, task: str) -> dict[str, str]:
    """Query id -> gold, of LaMP's outputs."""
    contents = [content for _, content in read_records(file)]
    if len(contents) != 1 or not isinstance(contents[0], dict) or "golds" not in contents[0]:
        raise InputError(f'{file}: has no list "golds"; expected LaMP\'s own outputs file')
    golds: dict[str, str] = {}
    for index, record in enumerate(list_of(contents[0]["golds"], str(file), "golds")):
        where = f"{file}: gold {index}"
        gold_id, output = fields_of(record, where, ("id", "output"), task)
        if gold_id in golds:
            raise InputError(f"{where} has the id {short(gold_id)} of an earlier gold")
        golds[gold_id] = output
    return golds


class _Reader:
    """Checks the users of one or more files, and gives them on as tables of about ROW_GROUP bytes.

    dropped, drawn: as in `Found`, so far.
    """

    def __init__(self, task: LampTask, write: Callable[[pa.Table], None], seed: int) -> None:
        self.task = task
        self.dropped: Counter[str] = Counter()
        self.drawn = 0
        self._write = write
        self._seed = seed
        # The users that are not written yet; rows begin with the number of their user.
        self._users: list[tuple[str, str | None]] = []
        self._items: list[Row] = []
        self._queries: list[Row] = []
        self._characters = 0

    def read(self, file: UserFile) -> None:
        golds = _read_golds(file.outputs, self.task.name) if file.outputs else None
        name = "user_id" if golds is None else "id"
        users: dict[str, str] = {}  # id -> place
        queries: dict[str, str] = {}
        for place, record in read_records(file.path):
            user_id, where = self._name(record, file.path, place, name, users)
            if golds is not None:
                if user_id not in golds:
                    raise InputError(f"{where} has no gold; get both files of one split")
                record["query"] = [record | {"gold": golds[user_id]}]
            self._ask(record.get("query", []), where, place, queries)
            self._add(user_id, file.role, record, where)
        if not users:
            raise InputError(f"{file.path}: holds an empty list; expected at least one user")
        if golds and (alone := [gold_id for gold_id in golds if gold_id not in users]):
            raise InputError(
                f"{file.outputs}: the gold with id {short(alone[0])} has no question in "
                f"{file.path.name}; get both files of one split"
            )

    def take(self, record: Any, file: Path, place: str, users: dict[str, str]) -> str:
        """Take a user's items, or nothing of the user; returns the id. users: id -> place, so far.

        Raises InputError for what is no user.
        """
        user_id, where = self._name(record, file, place, "user_id", users)
        self._add(user_id, None, record, where)
        return user_id

    def _add(self, user_id: str, role: str | None, record: Any, where: str) -> None:
        """Take a user's items; users so far are given on where they hold enough text."""
        self._show(record, where)
        self._users.append((user_id, role))
        if self._characters >= ROW_GROUP:
            self.flush()

    def _name(
        self, record: Any, file: Path, place: str, name: str, users: dict[str, str]
    ) -> tuple[str, str]:
        """The id of the next user, which is noted in `users`, and what messages call the user."""
        where = f"{file}: {place}"
        if name == "user_id" and isinstance(record, dict) and "user_id" not in record:
            hint = "give every user one, as one user a line or as a JSON list of users"
            if "input" in record:
                hint = "these are LaMP's own questions: give the folder that holds them"
            raise InputError(f"{where} has no user_id; {hint}")
        (user_id,) = fields_of(record, where, (name,), self.task.name)
        where += f" ({name} {short(user_id)})"
        if user_id in users:
            raise InputError(f"{where} has the {name} of {users[user_id]}; ids must differ")
        users[user_id] = place
        return user_id, where

    def flush(self) -> None:
        """Give on the users so far, without what is dropped."""
        if not self._users:
            return
        labels = self.task.labels
        shown = (*labels, UNASKED) if labels and self.task.items == "built" else labels
        items, held = self._usable(
            self._items, shown, kept.EMPTY_ITEM, kept.UNKNOWN_LABEL, kept.DUPLICATE_ITEM
        )
        queries, asked = self._usable(self._queries, labels, kept.EMPTY_QUERY, kept.UNKNOWN_GOLD)
        left = held > 0
        self.dropped[kept.EMPTY_USER] += int((~left).sum())
        self.dropped[kept.ORPHAN_QUERY] += int(asked[~left].sum())
        queries = queries.filter(left[queries["user"].to_numpy()])
        queries = queries.select("id", input="text", gold="answer")
        user_ids, roles = zip(*self._users, strict=True)
        columns = [
            pl.Series(user_ids).filter(left).to_arrow(),
            pl.Series(roles, dtype=pl.String).filter(left).to_arrow(),
            lists(held[left], items.drop("user").to_struct()),
            lists(asked[left], queries.to_struct()),
        ]
        self._write(pa.table(columns, schema=USERS))
        self._users, self._items, self._queries, self._characters = [], [], [], 0

    def _usable(
        self, rows: list[Row], labels: tuple[str, ...], *reasons: str
    ) -> tuple[pl.DataFrame, NDArray[np.intp]]:
        """The usable rows, and how many of them each user has."""
        frame = pl.DataFrame(rows, ROW, orient="row")
        frame, dropped = kept.usable(frame, self.task, labels, *reasons)
        self.dropped.update(dropped)
        return frame, np.bincount(frame["user"], minlength=len(self._users))

    def _ask(self, given: Any, where: str, place: str, seen: dict[str, str]) -> None:
        """Take the next user's queries. seen: query id -> place, of all users of the file."""
        for number, query in enumerate(list_of(given, where, "query")):
            at = f"{where}, query {number}"
            query_id, asked, gold = fields_of(query, at, ("id", "input", "gold"), self.task.name)
            # Predictions are matched to golds by query id alone (LaMP's rule).
            if query_id in seen:
                raise InputError(
                    f"{at} has the id {short(query_id)}, which a query of {seen[query_id]} has "
                    "too; give every query its own id"
                )
            seen[query_id] = place
            self._queries.append((len(self._users), query_id, asked, gold))
            self._characters += len(asked)

    def _show(self, record: dict[str, Any], where: str) -> None:
        """Take the next user's items."""
        if "profile" not in record:
            raise InputError(f"{where} has no profile; every user needs its list of items")
        profile, task = list_of(record["profile"], where, "profile"), self.task
        items: Sequence[Sequence[str]]
        if task.items == "built":
            items, lost, drawn = read_papers(profile, where, task.name, self._seed)
            self.dropped[kept.NO_NEGATIVE] += lost
            self.drawn += drawn
        else:
            names = (task.text_field, task.answer_field)
            items = [
                item_fields(item, n, f"{where}, profile item {n}", names, task.name)
                for n, item in enumerate(profile)
            ]
        number = len(self._users)
        self._items += [(number, item_id, text, answer) for item_id, text, answer in items]
        self._characters += sum(len(text) for _, text, _ in items)

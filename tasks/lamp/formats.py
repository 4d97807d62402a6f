"""Read LaMP data in its two formats, check it, and count what is dropped.

User file (OPPU, Per-Pcs, MTA): a list of {user_id, profile: [item], query: [{id, input, gold}]},
or JSON Lines, one such user a line.
LaMP official: `{split}_questions.json`, a list of {id, input, profile: [item]}, and
`{split}_outputs.json`, {task, golds: [{id, output}]}; each question is a user of its own.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from tasks.errors import InputError
from tasks.lamp import kept
from tasks.lamp.citations import read_papers
from tasks.lamp.definitions import LampTask
from tasks.lamp.folders import UserFile, find_files
from tasks.lamp.records import fields_of, item_fields, list_of, quoted, read_records
from tasks.lamp.tables import NO_USERS, ROW_GROUP, USERS

Row = dict[str, str]
# A row of `tables.USERS`.
User = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What was read besides the users.

    dropped: reason -> how many items, queries or users. drawn: as in `citations.Papers`.
    """

    dropped: dict[str, int]
    drawn: int


@dataclass(frozen=True)
class Loaded(Found):
    """users: one row per user in the order of the files, columns as `tables.USERS`."""

    users: pl.DataFrame


def read_users(path: Path | str, task: LampTask, seed: int = 0) -> Loaded:
    """Read the users of one LaMP task into memory.

    path: a user file; or a folder with user files by role (`folders.ROLE_FILE_NAMES`), with one
    user file, or with LaMP's official questions and outputs (dev if it is there, else train).
    What cannot be used is dropped and counted (tasks/lamp/kept.py). seed: draws the citation of a
    LaMP-1 paper that names several. Raises InputError for anything of another shape.
    """
    frames = [NO_USERS]
    counts = _read(Path(path), task, seed, frames.append)
    return Loaded(**vars(counts), users=pl.concat(frames))


def copy_users(path: Path | str, task: LampTask, to: Path, seed: int = 0) -> Found:
    """Read users as `read_users` does, and write them to the Arrow file `to` meanwhile.

    Memory holds a few megabytes of users and the golds of LaMP's official files. `tables.mapped`
    reads the file. An error leaves an unfinished file.
    """
    with pa.ipc.new_file(str(to), USERS) as file:
        write = file.write_table
        return _read(Path(path), task, seed, lambda users: write(users.to_arrow().cast(USERS)))


@dataclass(frozen=True)
class History:
    """A user's items that can be used, {id, text, answer}. length: of all in the file."""

    user_id: str
    profile: list[dict[str, str]]
    length: int


def read_histories(file: Path, task: LampTask, seed: int = 0) -> list[History | InputError]:
    """The users of a user file in their order; in a user's place what is wrong with the user.

    Items are checked and dropped as by `read_users`; queries are not looked at. A file that cannot
    be read to its end is one fault more.
    """
    reader, outcomes, lengths = _Reader(task, seed), list[str | InputError](), dict[str, int]()

    def readable() -> Iterator[User]:
        places: dict[str, str] = {}
        try:
            for place, record in read_records(file, outcomes.append):
                try:
                    user_id, location = reader.name(record, file, place, "user_id", places)
                    items = reader.items(record, location)
                except InputError as error:
                    outcomes.append(error)
                else:
                    outcomes.append(user_id)
                    lengths[user_id] = len(record["profile"])
                    yield {"user_id": user_id, "role": None, "profile": items, "query": []}
        except InputError as error:
            outcomes.append(error)

    rows = pl.concat([NO_USERS, *reader.frames(readable())]).select("user_id", "profile")
    usable = dict(rows.iter_rows())
    return [
        one if isinstance(one, InputError) else History(one, usable.get(one, []), lengths[one])
        for one in outcomes
    ]


def _read(path: Path, task: LampTask, seed: int, take: Callable[[pl.DataFrame], None]) -> Found:
    reader = _Reader(task, seed)
    users = (user for file in find_files(path) for user in reader.users(file))
    for frame in reader.frames(users):
        take(frame)
    dropped = {reason: count for reason, count in sorted(reader.dropped.items()) if count}
    return Found(dropped, reader.drawn)


def _read_golds(file: Path, task: str) -> dict[str, str]:
    """Query id -> gold, of LaMP's outputs."""
    contents = [content for _, content in read_records(file)]
    if len(contents) != 1 or not isinstance(contents[0], dict) or "golds" not in contents[0]:
        raise InputError(f'{file}: has no list "golds"; expected LaMP\'s own outputs file')
    golds: dict[str, str] = {}
    for index, record in enumerate(list_of(contents[0]["golds"], str(file), "golds")):
        location = f"{file}: gold {index}"
        gold_id, output = fields_of(record, location, ("id", "output"), task)
        if gold_id in golds:
            raise InputError(f"{location} has the id {quoted(gold_id)} of an earlier gold")
        golds[gold_id] = output
    return golds


class _Reader:
    """Checks users of one or more files. dropped, drawn: as in `Found`, so far."""

    def __init__(self, task: LampTask, seed: int) -> None:
        self.task = task
        self.dropped: Counter[str] = Counter()
        self.drawn = 0
        self._seed = seed

    def users(self, file: UserFile) -> Iterator[User]:
        """The users of a file. Raises InputError at the first that is none, or has no gold."""
        golds = _read_golds(file.outputs, self.task.name) if file.outputs else None
        name = "user_id" if golds is None else "id"
        users: dict[str, str] = {}  # id -> place
        queries: dict[str, str] = {}
        for place, record in read_records(file.path):
            user_id, location = self.name(record, file.path, place, name, users)
            asked = record.get("query", [])
            if golds is not None:
                if user_id not in golds:
                    raise InputError(f"{location} has no gold; get both files of one split")
                asked = [record | {"gold": golds[user_id]}]
            asked = self._queries(asked, location, place, queries)
            profile = self.items(record, location)
            yield {"user_id": user_id, "role": file.role, "profile": profile, "query": asked}
        if not users:
            raise InputError(f"{file.path}: holds an empty list; expected at least one user")
        if golds and (alone := [gold_id for gold_id in golds if gold_id not in users]):
            raise InputError(
                f"{file.outputs}: the gold with id {quoted(alone[0])} has no question in "
                f"{file.path.name}; get both files of one split"
            )

    def name(
        self, record: Any, file: Path, place: str, name: str, users: dict[str, str]
    ) -> tuple[str, str]:
        """The id of the next user, which is noted in `users`, and what messages call the user."""
        location = f"{file}: {place}"
        if name == "user_id" and isinstance(record, dict) and "user_id" not in record:
            hint = "give every user one, as one user a line or as a JSON list of users"
            if "input" in record:
                hint = "these are LaMP's own questions: give the folder that holds them"
            raise InputError(f"{location} has no user_id; {hint}")
        (user_id,) = fields_of(record, location, (name,), self.task.name)
        location += f" ({name} {quoted(user_id)})"
        if user_id in users:
            raise InputError(f"{location} has the {name} of {users[user_id]}; ids must differ")
        users[user_id] = place
        return user_id, location

    def items(self, record: dict[str, Any], location: str) -> list[Row]:
        """A user's items; papers as questions."""
        if "profile" not in record:
            raise InputError(f"{location} has no profile; every user needs its list of items")
        profile, task = list_of(record["profile"], location, "profile"), self.task
        items: Sequence[Sequence[str]]
        if task.items == "built":
            items, lost, drawn = read_papers(profile, location, task.name, self._seed)
            self.dropped[kept.NO_NEGATIVE] += lost
            self.drawn += drawn
        else:
            names = (task.text_field, task.answer_field)
            items = [
                item_fields(item, n, f"{location}, profile item {n}", names, task.name)
                for n, item in enumerate(profile)
            ]
        return [{"id": item_id, "text": text, "answer": answer} for item_id, text, answer in items]

    def _queries(self, asked: Any, location: str, place: str, seen: dict[str, str]) -> list[Row]:
        """A user's queries. seen: query id -> place, of all users of the file."""
        rows = []
        for number, query in enumerate(list_of(asked, location, "query")):
            at = f"{location}, query {number}"
            names = ("id", "input", "gold")
            query_id, text, gold = fields_of(query, at, names, self.task.name)
            # Predictions are matched to golds by query id alone (LaMP's rule).
            if query_id in seen:
                raise InputError(
                    f"{at} has the id {quoted(query_id)}, which a query of {seen[query_id]} has "
                    "too; give every query its own id"
                )
            seen[query_id] = place
            rows.append({"id": query_id, "input": text, "gold": gold})
        return rows

    def frames(self, users: Iterable[User]) -> Iterator[pl.DataFrame]:
        """The users without what is dropped, about ROW_GROUP characters a frame."""
        part: list[User] = []
        size = 0
        for user in users:
            part.append(user)
            size += sum(len(item["text"]) for item in user["profile"])
            size += sum(len(query["input"]) for query in user["query"])
            if size >= ROW_GROUP:
                yield self._usable(part)
                part, size = [], 0
        if part:
            yield self._usable(part)

    def _usable(self, users: list[User]) -> pl.DataFrame:
        table = pl.from_arrow(pa.Table.from_pylist(users, USERS))
        frame, dropped = kept.usable(pl.DataFrame(table), self.task)
        self.dropped += dropped
        return frame

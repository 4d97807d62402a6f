"""Users of prepared tables (tasks/prepare.py) as records: user_id, group, profile, query."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from tasks.lamp.tables import read_table, row_groups
from tasks.record import File
from tasks.results.store import store


@dataclass(frozen=True)
class Users:
    """Users of tables, read anew at each iteration.

    Only a few row groups are in memory. places: the numbers of the users to read; None: all.
    """

    tables: tuple[File, ...]
    places: Collection[int] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first, wanted = 0, None if self.places is None else {*self.places}
        for file in self.tables:
            for part in row_groups(store().path(file)):
                for row in range(len(part)):
                    if wanted is None or first + row in wanted:
                        yield from part.slice(row, 1).to_pylist()
                first += len(part)


def each_user(table: File) -> Users:
    """All users of one side, in the order of the table."""
    return Users((table,))


def users_of(table: File, ids: Collection[str] | None = None) -> list[dict[str, Any]]:
    """As `each_user`, in memory. ids: only these users; other row groups are not read."""
    return read_table(store().path(table), ids).to_dicts()


def users_in_order(table: File, ids: Collection[str]) -> list[dict[str, Any]]:
    """The users of one side with these ids, in the order of the ids."""
    by_id = {user["user_id"]: user for user in users_of(table, ids)}
    return [by_id[user_id] for user_id in ids]

"""Users as Arrow tables, and tables as parquet files that grow row group by row group.

A row group holds whole users and about ROW_GROUP bytes of text, so a user is read without the rest
of the file. What is in a file depends on the users alone, not on how they came.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 4 << 20

TEXT = pa.large_string()  # as polars has it
ITEM = pa.struct([("id", TEXT), ("text", TEXT), ("answer", TEXT)])
QUERY = pa.struct([("id", TEXT), ("input", TEXT), ("gold", TEXT)])
USERS = pa.schema(
    [
        ("user_id", TEXT),
        ("role", TEXT),
        ("profile", pa.large_list(ITEM)),
        ("query", pa.large_list(QUERY)),
    ]
)

Write = Callable[[pa.Table], None]


class Records(NamedTuple):
    """Items as (id, text, answer), or queries as (id, input, gold): three lists of one length."""

    ids: list[str]
    texts: list[str]
    answers: list[str]


class Rows:
    """Hands users on as tables of USERS, whole users of about ROW_GROUP bytes each."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._clear()

    def add(self, user_id: str, role: str | None, profile: Records, query: Records) -> None:
        self._users.append(user_id)
        self._roles.append(role)
        self._profiles.append(profile)
        self._queries.append(query)
        self._characters += sum(map(len, profile.texts)) + sum(map(len, query.texts))
        if self._characters >= ROW_GROUP:
            self.flush()

    def flush(self) -> None:
        if self._users:
            lengths = np.array([len(profile.ids) for profile in self._profiles])
            columns = [_joined(field) for field in zip(*self._profiles, strict=True)]
            self._table(self._users, self._roles, lists(lengths, columns, ITEM), self._queries)
            self._clear()

    def add_block(
        self,
        user_ids: list[str],
        role: str | None,
        lengths: np.ndarray,
        items: Sequence[pl.Series],
        queries: list[Records],
    ) -> None:
        """Many users [U] at once. items: id, text, answer [N]; lengths: [U], how many are whose."""
        self.flush()
        profiles = lists(lengths, [column.to_arrow() for column in items], ITEM)
        self._table(user_ids, [role] * len(user_ids), profiles, queries)

    def _table(
        self,
        user_ids: list[str],
        roles: list[str | None],
        profiles: pa.Array,
        queries: list[Records],
    ) -> None:
        lengths = np.array([len(query.ids) for query in queries])
        columns = [_joined(field) for field in zip(*queries, strict=True)]
        users = [_joined([user_ids]), _joined([roles])]
        self._write(pa.table([*users, profiles, lists(lengths, columns, QUERY)], schema=USERS))

    def _clear(self) -> None:
        self._users: list[str] = []
        self._roles: list[str | None] = []
        self._profiles: list[Records] = []
        self._queries: list[Records] = []
        self._characters = 0


def lists(lengths: np.ndarray, columns: Sequence[pa.Array], kind: pa.StructType) -> pa.Array:
    """Lists of the structs that the columns are: the first `lengths[0]`, and so on."""
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    structs = pa.StructArray.from_arrays(columns, fields=list(kind))
    return pa.LargeListArray.from_arrays(pl.Series(ends).to_arrow(), structs)


def _joined(values: Iterable[Sequence[str | None]]) -> pa.Array:
    """As pa.array, which would import pandas to look at a list."""
    return pl.Series(list(chain.from_iterable(values)), dtype=pl.String).to_arrow()


@contextmanager
def parquet(path: Path, schema: pa.Schema, compression: str = "zstd") -> Iterator[Write]:
    """Gives what writes a table to `path` as one row group; the file is whole when this ends.

    Compressed and written in a thread of its own, one table ahead at most. pyarrow and not polars:
    its writer takes a third of the time.
    """
    pending: list[Future[None]] = []
    # Statistics of texts are as large as texts; those of user_id tell in which row group a user is.
    plain = {"use_dictionary": False, "write_statistics": ["user_id"]}
    with (
        pq.ParquetWriter(path, schema, compression=compression, **plain) as writer,
        ThreadPoolExecutor(1, thread_name_prefix="parquet") as thread,
    ):

        def write(table: pa.Table) -> None:
            while pending:
                pending.pop().result()
            pending.append(thread.submit(writer.write_table, table))

        yield write
        while pending:
            pending.pop().result()


def row_groups(
    path: Path, most: int = 32 << 20, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """A parquet file in tables of whole row groups, of about `most` bytes each, in order."""
    with pq.ParquetFile(path) as file:
        chosen: list[int] = []
        size = 0
        for number in range(file.num_row_groups):
            chosen.append(number)
            size += file.metadata.row_group(number).total_byte_size
            if size >= most or number == file.num_row_groups - 1:
                yield file.read_row_groups(chosen, columns=columns)
                chosen, size = [], 0


def read_table(path: Path, ids: Collection[str] | None = None) -> pl.DataFrame:
    """A parquet file in the order of its column user_id; of `ids` alone, if they are given.

    Of them it reads those row groups only in which, by their bounds, one of them may be.
    """
    if ids is None:
        return pl.read_parquet(path)
    wanted = sorted(set(ids))
    with pq.ParquetFile(path) as file:
        chosen = []
        for number in range(file.num_row_groups):
            bounds = file.metadata.row_group(number).column(0).statistics
            # Of ids too long to be kept there are none.
            known = bounds is not None and bounds.has_min_max
            if not known or bisect_left(wanted, bounds.min) < bisect_right(wanted, bounds.max):
                chosen.append(number)
        found = pl.DataFrame(pl.from_arrow(file.read_row_groups(chosen)))
    return found.filter(pl.col("user_id").is_in(wanted))

"""Users as Arrow tables, and parquet files that are written row group by row group.

A row group holds whole users and about ROW_GROUP bytes of text, so a user can be read without the
rest of the file. A file's content depends on the users alone.
"""

from __future__ import annotations

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
    """Collects users, and writes them as tables of about ROW_GROUP bytes."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._users: list[tuple[str, str | None, Records, Records]] = []
        self._characters = 0

    def add(self, user_id: str, role: str | None, profile: Records, query: Records) -> None:
        self._users.append((user_id, role, profile, query))
        self._characters += sum(map(len, profile.texts)) + sum(map(len, query.texts))
        if self._characters >= ROW_GROUP:
            self.flush()

    def flush(self) -> None:
        if self._users:
            user_ids, roles, profiles, queries = zip(*self._users, strict=True)
            columns = [_joined([user_ids]), _joined([roles])]
            for records, kind in ((profiles, ITEM), (queries, QUERY)):
                lengths = np.array([len(one.ids) for one in records])
                fields = [_joined(field) for field in zip(*records, strict=True)]
                columns.append(lists(lengths, fields, kind))
            self._write(pa.table(columns, schema=USERS))
            self._users, self._characters = [], 0


def lists(lengths: np.ndarray, columns: Sequence[pa.Array], kind: pa.StructType) -> pa.Array:
    """Lists of structs with the fields `columns`: the first list has `lengths[0]`, and so on."""
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    structs = pa.StructArray.from_arrays(columns, fields=list(kind))
    return pa.LargeListArray.from_arrays(pl.Series(ends).to_arrow(), structs)


def _joined(values: Iterable[Sequence[str | None]]) -> pa.Array:
    """An Arrow array; pa.array would import pandas."""
    return pl.Series(list(chain.from_iterable(values)), dtype=pl.String).to_arrow()


@contextmanager
def parquet(path: Path, schema: pa.Schema, compression: str = "zstd") -> Iterator[Write]:
    """Give a function that writes a table to `path` as one row group.

    A thread compresses and writes, one table ahead at most. pyarrow takes a third of polars' time.
    """
    pending: list[Future[None]] = []
    # Statistics of texts are as large as the texts; those of user_id say where a user is.
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
    """Yield a parquet file in tables of whole row groups, of about `most` bytes each."""
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
    """Read a parquet file, or only the rows whose user_id is one of `ids`, in the file's order.

    polars skips row groups that end before the first id or begin after the last, and decodes texts
    only where an id is.
    """
    if ids is None:
        return pl.read_parquet(path)
    wanted = pl.col("user_id").is_in(list(ids))
    if ids:
        wanted &= pl.col("user_id").is_between(pl.lit(min(ids)), pl.lit(max(ids)))
    return pl.scan_parquet(path).filter(wanted).collect()

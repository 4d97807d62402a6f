"""Write the sides of a split as parquet, in the order of user ids, in bounded memory.

Users come in the order of the input files and leave in the order of their ids, pooled by author.
Their texts stay in a file that is mapped into memory until a row group of users is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from tasks.lamp.tables import ROW_GROUP, SIDE, lists, mapped, write_parquet

COLUMNS = ("profile", "query")


def write_sides(users: Path, sides: Mapping[str, pl.DataFrame], folder: Path) -> None:
    """Write `<side>.parquet` for each side, with columns user_id, group, profile and query.

    users: a file of `formats.copy_users`. sides: frames of those columns from a split of its keyed
    users (`content.keyed`). Their ids say which items and queries of the file are written.
    """
    everyone = mapped(users)
    given = {name: everyone[name].explode(empty_as_null=False) for name in COLUMNS}
    sizes = given["profile"].struct.field("text").str.len_bytes()

    def tables(frame: pl.DataFrame) -> Iterator[pa.Table]:
        for part in _row_groups(frame, sizes[_numbers(frame["profile"])]):
            columns = [part["user_id"].to_arrow(), part["group"].to_arrow()]
            for name in COLUMNS:
                lengths = part[name].list.len().to_numpy()
                columns.append(lists(lengths, given[name][_numbers(part[name])]))
            yield pa.table(columns, names=SIDE.names)

    for side, frame in sides.items():
        write_parquet(folder / f"{side}.parquet", tables(frame))


def write_side(users: pl.DataFrame, file: Path) -> None:
    """Write users that are in memory, as `write_sides` does."""
    users = users.select(SIDE.names)
    sizes = users["profile"].explode(empty_as_null=False).struct.field("text").str.len_bytes()
    write_parquet(file, (part.to_arrow() for part in _row_groups(users, sizes)))


def pooled(users: pl.DataFrame, sides: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """user_id, row: the users that were pooled, and the author's row that has their items.

    users: all users as they came (`groups.Split.users`). sides: base and anchor, as in
    `write_sides`; few-shot users are never pooled.
    """
    found = [
        users.filter(pl.col("role") == side)
        .join(frame, on="user_id", how="anti")
        .join(frame, left_on="group", right_on="user_id", how="semi")
        .select("user_id", row="group")
        for side, frame in sides.items()
    ]
    return pl.concat(found).unique().sort("user_id", "row")


def _numbers(column: pl.Series) -> pl.Series:
    """The numbers in the file of all items, or queries, of keyed users."""
    return column.explode(empty_as_null=False).struct.field("id").cast(pl.UInt32)


def _row_groups(users: pl.DataFrame, sizes: pl.Series) -> Iterator[pl.DataFrame]:
    """Yield parts of whole users with about ROW_GROUP bytes of text. sizes: bytes of each item."""
    ends = users["profile"].list.len().cum_sum().to_numpy()
    written = np.concatenate([[0], np.cumsum(sizes)])[ends]  # up to the end of each user
    starts = np.flatnonzero(np.diff((written - 1) // ROW_GROUP, prepend=-2)).tolist()
    for start, end in zip(starts, [*starts, users.height][1:], strict=True):
        yield users[start:end]

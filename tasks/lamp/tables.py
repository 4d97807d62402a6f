"""Users as tables: an Arrow file that is mapped into memory, and parquet of whole users.

A row group of parquet holds whole users and about ROW_GROUP bytes of text, so a user can be read
without the rest of the file. A file's content depends on the users alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

ROW_GROUP = 4 << 20

TEXT = pa.large_string()  # as polars has it
ITEM = pa.struct([("id", TEXT), ("text", TEXT), ("answer", TEXT)])
QUERY = pa.struct([("id", TEXT), ("input", TEXT), ("gold", TEXT)])
LISTS = [("profile", pa.large_list(ITEM)), ("query", pa.large_list(QUERY))]
USERS = pa.schema([("user_id", TEXT), ("role", TEXT), *LISTS])
SIDE = pa.schema([("user_id", TEXT), ("group", TEXT), *LISTS])


def lists(lengths: NDArray[np.int64], values: pl.Series) -> pa.Array:
    """Lists of `values`: the first list has `lengths[0]` of them, and so on."""
    ends = pl.Series(np.concatenate([[0], np.cumsum(lengths)]), dtype=pl.Int64)
    return pa.LargeListArray.from_arrays(ends.to_arrow(), values.to_arrow())


def mapped(users: Path) -> pl.DataFrame:
    """The users of an Arrow file (`formats.copy_users`); texts are read when they are asked for."""
    with pa.memory_map(str(users)) as file:
        return pl.DataFrame(pl.from_arrow(pa.ipc.open_file(file).read_all()))


def write_parquet(file: Path, tables: Iterable[pa.Table]) -> None:
    """Write users of a side, a row group a table."""
    with pq.ParquetWriter(
        file,
        SIDE,
        compression="zstd",
        use_dictionary=False,
        # Statistics of texts are as large as the texts; those of user_id say where a user is.
        write_statistics=["user_id"],
    ) as writer:
        for table in tables:
            writer.write_table(table.cast(SIDE))


def row_groups(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield a parquet file row group by row group."""
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, columns=columns)


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

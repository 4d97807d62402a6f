"""Users as tables: an Arrow file that is mapped into memory, and the sides of a split as parquet.

Users come in the order of the input files and leave in the order of their ids, pooled by author;
base users that are candidates, too, stand behind the other candidates (`append`). Their texts stay
in the mapped file until a row group of a side is written. It holds whole users and about ROW_GROUP
bytes of text, so a user can be read without the rest of the file. A side's file depends on the
side's users alone.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

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
# role: base, anchor, few_shot, or null where the data does not say.
USERS = pa.schema([("user_id", TEXT), ("role", TEXT), *LISTS])
NO_USERS = pl.DataFrame(pl.from_arrow(USERS.empty_table()))
SIDE = pa.schema([("user_id", TEXT), ("group", TEXT), *LISTS])


def lists(lengths: NDArray[np.integer[Any]], values: pl.Series) -> pa.Array:
    """Lists of `values`: the first list has `lengths[0]` of them, and so on."""
    ends = pl.Series(np.concatenate([[0], np.cumsum(lengths)]), dtype=pl.Int64)
    return pa.LargeListArray.from_arrays(ends.to_arrow(), values.to_arrow())


def mapped(users: Path) -> pl.DataFrame:
    """The users of an Arrow file (`formats.copy_users`); texts are read when they are asked for."""
    with pa.memory_map(str(users)) as file:
        return pl.DataFrame(pl.from_arrow(pa.ipc.open_file(file).read_all()))


def row_groups(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield a parquet file row group by row group."""
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, columns=columns)


def read_table(path: Path, ids: Collection[str] | None = None) -> pl.DataFrame:
    """Read a parquet file, or only the rows whose user_id is one of `ids`, in the file's order.

    polars skips row groups without an id between the first and the last of `ids`.
    """
    if ids is None:
        return pl.read_parquet(path)
    wanted = pl.col("user_id").is_in(list(ids))
    if ids:
        wanted &= pl.col("user_id").is_between(pl.lit(min(ids)), pl.lit(max(ids)))
    return pl.scan_parquet(path).filter(wanted).collect()


def write_sides(users: Path, sides: Mapping[str, pl.DataFrame], folder: Path) -> None:
    """Write `<side>.parquet` for each side, with columns user_id, group, profile and query.

    users: a file of `formats.copy_users`. sides: frames of those columns with its keyed users
    (`content.keyed`), whose ids say which items and queries of the file are written.
    """
    everyone = mapped(users)
    everything = {name: everyone[name].explode(empty_as_null=False) for name, _ in LISTS}
    sizes = everything["profile"].struct.field("text").str.len_bytes()

    def with_texts(part: pl.DataFrame) -> pa.Table:
        columns = [part["user_id"].to_arrow(), part["group"].to_arrow()]
        for name, _ in LISTS:
            lengths = part[name].list.len().to_numpy()
            columns.append(lists(lengths, everything[name][_numbers(part[name])]))
        return pa.table(columns, names=SIDE.names)

    for side, frame in sides.items():
        file = folder / f"{side}.parquet"
        _write(file, frame, sizes[_numbers(frame["profile"])], with_texts)


def write_side(users: pl.DataFrame, file: Path) -> None:
    """Write users that are in memory, as `write_sides` does."""
    users = users.select(SIDE.names)
    sizes = users["profile"].explode(empty_as_null=False).struct.field("text").str.len_bytes()
    _write(file, users, sizes, pl.DataFrame.to_arrow)


def append(source: Path, target: Path) -> None:
    """Put the users of one side's file behind those of another's, row group by row group."""
    whole = target.with_suffix(".whole")
    with _writer(whole) as writer:
        for file in (target, source):
            for group in row_groups(file):
                writer.write_table(group)
    whole.replace(target)


def pooled(users: pl.DataFrame, sides: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """user_id, row: the users that were pooled, and the author's row that has their items.

    users: `splits.Split.users`. sides: base and anchor, as few-shot users are never pooled.
    """
    by_side = [
        users.filter(pl.col("role") == side)
        .join(frame, on="user_id", how="anti")
        .join(frame, left_on="group", right_on="user_id", how="semi")
        .select("user_id", row="group")
        for side, frame in sides.items()
    ]
    return pl.concat(by_side).unique().sort("user_id", "row")


def _write(
    file: Path, users: pl.DataFrame, sizes: pl.Series, table: Callable[[pl.DataFrame], pa.Table]
) -> None:
    """Write row groups of whole users with about ROW_GROUP bytes of text.

    sizes: bytes of each item. table: gives some of the users with their texts.
    """
    ends = users["profile"].list.len().cum_sum().to_numpy()
    written = np.concatenate([[0], np.cumsum(sizes)])[ends]  # up to the end of each user
    starts = np.flatnonzero(np.diff((written - 1) // ROW_GROUP, prepend=-2)).tolist()
    with _writer(file) as writer:
        for start, end in zip(starts, [*starts, users.height][1:], strict=True):
            writer.write_table(table(users[start:end]).cast(SIDE))


def _writer(file: Path) -> pq.ParquetWriter:
    """Writes a side's file. Its statistics say where a user is; those of texts would be as large as
    the texts."""
    return pq.ParquetWriter(
        file, SIDE, compression="zstd", use_dictionary=False, write_statistics=["user_id"]
    )


def _numbers(column: pl.Series) -> pl.Series:
    """The numbers in the file of all items, or queries, of keyed users."""
    return column.explode(empty_as_null=False).struct.field("id").cast(pl.UInt32)

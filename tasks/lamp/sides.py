"""Write the sides of a split as parquet, in the order of user ids, in bounded memory.

Users come in the order of the input files and leave in the order of their ids, pooled by author.
Items first go into pieces on the disk, a piece for some users. Then one piece at a time is sorted
in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from tasks.lamp.tables import ITEM, QUERY, ROW_GROUP, TEXT, lists, parquet, row_groups

# Items of one piece; fixed, so that a side's file depends on the side's users alone.
PIECE = 100_000
SCHEMA = pa.schema(
    [
        ("user_id", TEXT),
        ("group", TEXT),
        ("profile", pa.large_list(ITEM)),
        ("query", pa.large_list(QUERY)),
    ]
)
KINDS = {"profile": ITEM, "query": QUERY}


class _Piece(NamedTuple):
    """Users `first` to `end` of a side."""

    side: str
    first: int
    end: int


def write_sides(users: Path, sides: Mapping[str, pl.DataFrame], folder: Path) -> None:
    """Write `<side>.parquet` for each side, with columns user_id, group, profile and query.

    users: a file of `formats.copy_users`. sides: frames of those columns from a split of its keyed
    users (`content.keyed`). Their ids say which items and queries of the file are written.
    """
    pieces = [piece for side, frame in sides.items() for piece in _pieces(side, frame)]
    with tempfile.TemporaryDirectory(prefix="pieces-", dir=folder) as name:
        scattered = {column: _scatter(users, sides, pieces, column, Path(name)) for column in KINDS}
        for side, frame in sides.items():
            with parquet(folder / f"{side}.parquet", SCHEMA) as write:
                for number, piece in enumerate(pieces):
                    if piece.side == side:
                        part = frame[piece.first : piece.end]
                        columns = [part["user_id"].to_arrow(), part["group"].to_arrow()]
                        columns += [
                            _gather(scattered[column][number], part[column]) for column in KINDS
                        ]
                        for table in _row_groups(pa.table(columns, schema=SCHEMA)):
                            write(table)


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


def write_side(users: pl.DataFrame, file: Path) -> None:
    """Write users that are in memory, as `write_sides` does."""
    with parquet(file, SCHEMA) as write:
        for table in _row_groups(users.select(SCHEMA.names).to_arrow().cast(SCHEMA)):
            write(table)


def _pieces(side: str, frame: pl.DataFrame) -> Iterator[_Piece]:
    ends = frame["profile"].list.len().cast(pl.Int64).cum_sum().to_numpy()
    first = 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        end = max(first + 1, int(np.searchsorted(ends, before + PIECE, side="right")))
        yield _Piece(side, first, end)
        first = end


def _scatter(
    users: Path,
    sides: Mapping[str, pl.DataFrame],
    pieces: list[_Piece],
    column: str,
    folder: Path,
) -> list[Path]:
    """Write the items of each piece to a file of its own, with their place in the piece."""
    wanted = _wanted(sides, pieces, column)
    files = [folder / f"{column}-{number}.arrow" for number in range(len(pieces))]
    schema = pa.schema([("place", pa.uint32()), *KINDS[column]])
    with ExitStack() as stack:
        streams = [stack.enter_context(pa.ipc.new_stream(str(file), schema)) for file in files]
        start = 0
        for table in row_groups(users, columns=[column]):
            flat = pl.Series(pl.from_arrow(table[column])).explode(empty_as_null=False)
            first, end = wanted["number"].search_sorted(np.array([start, start + len(flat)]))
            here = wanted[first:end]
            found = flat.gather(here["number"] - start).struct.unnest()
            for (piece,), part in found.with_columns(here["piece"], here["place"]).group_by(
                "piece"
            ):
                fields = part.select("place", *found.columns).to_arrow()
                streams[piece].write_table(fields.cast(schema))
            start += len(flat)
    return files


def _wanted(sides: Mapping[str, pl.DataFrame], pieces: list[_Piece], column: str) -> pl.DataFrame:
    """number (in the file), piece and place (in the piece) of all items of the sides, by number."""
    parts = []
    for number, piece in enumerate(pieces):
        held = sides[piece.side][column][piece.first : piece.end].explode(empty_as_null=False)
        numbers = held.struct.field("id").cast(pl.UInt32)
        places = pl.int_range(len(numbers), dtype=pl.UInt32, eager=True)
        parts.append(
            pl.DataFrame({"number": numbers, "place": places}).with_columns(
                piece=pl.lit(number, pl.UInt32)
            )
        )
    empty = dict.fromkeys(("number", "place", "piece"), pl.UInt32)
    return pl.concat([pl.DataFrame(schema=empty), *parts]).sort("number")


def _gather(file: Path, held: pl.Series) -> pa.Array:
    """A piece's items as the lists of its users, in their order."""
    with pa.ipc.open_stream(str(file)) as stream:
        table: Any = pl.from_arrow(stream.read_all())
    table = table.sort("place").drop("place")
    kind = KINDS[held.name]
    return lists(held.list.len().to_numpy(), [table[f.name].to_arrow() for f in kind], kind)


def _row_groups(table: pa.Table) -> Iterator[pa.Table]:
    """Yield parts of whole users, with about ROW_GROUP bytes of text each."""
    column = pl.Series(pl.from_arrow(table["profile"]))
    bytes_ = column.list.eval(pl.element().struct.field("text").str.len_bytes()).list.sum()
    numbers = (bytes_.cum_sum() - 1).to_numpy() // ROW_GROUP
    starts = np.flatnonzero(np.diff(numbers, prepend=-2))
    ends = [*starts, len(table)][1:]
    for first, end in zip(starts, ends, strict=True):
        yield table.slice(first, end - first)

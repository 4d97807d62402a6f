"""Users' vectors by hand, and banks of anchors that were never trained."""

from __future__ import annotations

import polars as pl

from tasks.embed import TABLE
from tasks.record import File
from tasks.results.models import Bank, Embedded, MetaLora, Training
from tasks.results.store import store

SCHEMA = {"role": pl.String, "user_id": pl.String, "vector": pl.List(pl.Float32)}
NO_FILE = File(uri="none", sha256="none")
NO_TRAINING = Training()


def embedded(centred: bool = False, **roles: dict[str, list[float]]) -> Embedded:
    """An `embed` result with these vectors, in the store."""
    rows = [(role, name, vector) for role, own in roles.items() for name, vector in own.items()]
    with store().new("embed") as folder:
        table = pl.DataFrame(rows, schema=SCHEMA, orient="row")
        table.write_parquet(folder.path / TABLE)
    return Embedded(
        table=folder.file(TABLE), centred=centred, users=len(rows), dimensions=len(rows[0][2])
    )


def bank_of(members: dict[str, list[str]]) -> Bank:
    """A bank of these anchors: each with its members."""
    loras = tuple(
        MetaLora(anchor=name, members=tuple(own), adapter=NO_FILE, training=NO_TRAINING)
        for name, own in members.items()
    )
    return Bank(file=NO_FILE, members=loras)

"""The Prefect server of the local stack: `prefect server`, with one change where it is on SQLite.

    python -m infra.local.prefect_server server start --host 127.0.0.1 --port 4200

SQLite takes one writer at a time. Prefect begins what will write as a reader (BEGIN DEFERRED), and
SQLite turns such a transaction away at once when another has written since: the client gets a 503,
waits two seconds, then four, then eight. What was turned away leaves a cursor behind in a cycle of
references. When Python's garbage collection comes to it while its connection waits for the lock, it
waits for that connection with the interpreter locked; so nothing runs that could give the lock
back, for the minute of Prefect's busy_timeout. Answers are lost by then, and runs with them.

Here what will write says so first (BEGIN IMMEDIATE) and is queued, for milliseconds.
"""

from __future__ import annotations

import runpy
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from prefect.server.database.configurations import AioSqliteConfiguration

_begin = AioSqliteConfiguration.begin_transaction


@asynccontextmanager
async def begin_to_write(
    self: AioSqliteConfiguration, session: Any, with_for_update: bool = True
) -> AsyncGenerator[Any, None]:
    """As Prefect's `begin_transaction`, whatever is asked for with the lock for writing."""
    async with _begin(self, session, with_for_update=True) as transaction:
        yield transaction


def main() -> None:
    AioSqliteConfiguration.begin_transaction = begin_to_write  # type: ignore[method-assign]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

"""What the local stack changes in the Prefect server."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from prefect.server.database.configurations import AioSqliteConfiguration

from infra.local.prefect_server import begin_to_write


def test_what_will_write_is_not_turned_away_by_who_wrote_since(tmp_path: Path) -> None:
    """One that reads, and writes after another would have, has the lock from the start.

    As Prefect begins it, the other's write succeeds and this one's fails ("database is locked").
    """
    file = tmp_path / "prefect.db"

    async def both() -> None:
        config = AioSqliteConfiguration(connection_url=f"sqlite+aiosqlite:///{file}", echo=False)
        engine = await config.engine()
        async with engine.begin() as connection:
            await connection.execute(sa.text("CREATE TABLE t (n INTEGER)"))
        async with await config.session(engine) as session, begin_to_write(config, session):
            found = await session.execute(sa.text("SELECT count(*) FROM t"))
            assert found.scalar() == 0
            with (
                sqlite3.connect(file, timeout=0.0) as other,
                pytest.raises(sqlite3.OperationalError, match="locked"),
            ):
                other.execute("INSERT INTO t VALUES (1)")
            other.close()
            await session.execute(sa.text("INSERT INTO t VALUES (2)"))
        await engine.dispose()

    asyncio.run(both())
    with sqlite3.connect(file) as read:
        assert read.execute("SELECT n FROM t").fetchall() == [(2,)]
    read.close()

"""PostgreSQL and an S3-compatible server for the local stack, without containers.

    python -m infra.native up      start what does not run, and print the environment
    python -m infra.native env     print the environment of what runs
    python -m infra.native down    end both; PostgreSQL's data stays

The environment is lines of `export NAME=value`, with the database's password among them:

    eval "$(python -m infra.native up)" && make benchmark

Variables: POSTGRES_PORT (5432), S3_PORT (9000), a free port is taken if it is not; MTA_NATIVE, the
folder (.mta/native). PostgreSQL does not run as root: then it runs as the user `postgres`, who must
be able to enter that folder.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from infra.buckets import make_buckets
from infra.command import one_word, say
from infra.local.api import answers
from infra.local.processes import Record, end, free_port, one_at_a_time, start, wait_until
from infra.local.settings import TELEMETRY_OFF, StackError, integer, project_layout
from infra.native import postgres, s3

TIMEOUT = 60.0

Say = Callable[[str], None]


def up(folder: Path, environ: Mapping[str, str], say: Say) -> dict[str, str]:
    """Start what does not run; the environment that leads the local stack there."""
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder, say):
        database = _running(folder, postgres.NAME)
        if database is None:
            port = free_port(integer(environ, "POSTGRES_PORT", 5432, least=1, most=65535))
            log = folder / f"{postgres.NAME}.log"
            data = postgres.make_cluster(folder, log)
            database = _start(folder, postgres.NAME, postgres.command(data, port), port, environ)
            wait_until(
                postgres.NAME, lambda: postgres.accepts(port),
                record=database, log=log, timeout=TIMEOUT, say=say,
            )  # fmt: skip
        postgres.make_databases(folder, database.port)
        storage = _running(folder, s3.NAME)
        if storage is None:
            port = free_port(integer(environ, "S3_PORT", 9000, least=1, most=65535))
            storage = _start(folder, s3.NAME, s3.command(port), port, environ)
            wait_until(
                s3.NAME, lambda: answers(s3.health_url(port)),
                record=storage, log=folder / f"{s3.NAME}.log", timeout=TIMEOUT, say=say,
            )  # fmt: skip
        make_buckets(s3.BUCKETS, s3.environment(storage.port))
    return environment(folder)


def environment(folder: Path) -> dict[str, str]:
    """What leads the local stack to both. Raises StackError where one does not run."""
    database, storage = (_running(folder, name) for name in (postgres.NAME, s3.NAME))
    if database is None or storage is None:
        missing = postgres.NAME if database is None else s3.NAME
        raise StackError(f"{missing} does not run: python -m infra.native up")
    asyncpg = "postgresql+asyncpg"
    return {
        "MTA_PREFECT_DATABASE": postgres.url(folder, database.port, "prefect", asyncpg),
        "MTA_MLFLOW_DATABASE": postgres.url(folder, database.port, "mlflow"),
        "MTA_MLFLOW_ARTIFACTS": "s3://mlflow/artifacts",
        **s3.environment(storage.port),
    }


def down(folder: Path, say: Say) -> None:
    """End both, storage first."""
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder, say):
        for name in (s3.NAME, postgres.NAME):
            record = Record.load(folder, name)
            if record is not None:
                say(f"ending {name} (pid {record.pid})")
                end(record)
                record.forget(folder)


def _running(folder: Path, name: str) -> Record | None:
    record = Record.load(folder, name)
    return record if record is not None and record.process() is not None else None


def _start(
    folder: Path, name: str, argv: list[str], port: int, environ: Mapping[str, str]
) -> Record:
    say(f"starting {name} on port {port}")
    env = {**environ, **TELEMETRY_OFF}
    # Not the project's folder: the user `postgres` may not be able to enter it.
    record = start(name, argv, env=env, cwd=Path("/"), log=folder / f"{name}.log", port=port)
    record.save(folder)
    return record


def _folder() -> Path:
    given = os.environ.get("MTA_NATIVE", "").strip()
    return Path(given).absolute() if given else project_layout().state / "native"


def _show(found: Mapping[str, str]) -> None:
    for name, value in found.items():
        print(f"export {name}={shlex.quote(value)}")


COMMANDS: dict[str, Callable[[], None]] = {
    "up": lambda: _show(up(_folder(), os.environ, say)),
    "env": lambda: _show(environment(_folder())),
    "down": lambda: down(_folder(), say),
}


def main(argv: list[str]) -> int:
    return one_word("infra.native", __doc__, COMMANDS, argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

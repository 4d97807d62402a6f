"""A PostgreSQL cluster of the project's own, from the system's packages.

Not run by itself; `python -m infra.native` is the program. It listens on 127.0.0.1 only and asks
for a password (scram-sha-256), which is made up at the first start.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from infra.local.processes import last_line
from infra.local.settings import HOST, StackError

NAME = "postgres"
USER = "mta"
DATABASES = ("prefect", "mlflow")


def programs() -> Path:
    """The folder of `initdb` and `postgres`. Raises StackError where they are not installed."""
    on_path = shutil.which("initdb")
    found = [Path(on_path).resolve()] if on_path else []
    # Debian keeps each version in a folder of its own, off the path.
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=_version)
    if not found:
        raise StackError("PostgreSQL is not installed: install the package `postgresql`")
    return found[-1].parent


def _version(initdb: Path) -> int:
    name = initdb.parents[1].name
    return int(name) if name.isdigit() else 0


def as_owner() -> list[str]:
    """What goes before a command of PostgreSQL, which refuses to run as root."""
    if os.geteuid() != 0:
        return []
    try:
        pwd.getpwnam(NAME)
    except KeyError:
        raise StackError(
            "PostgreSQL does not run as root, and there is no user `postgres` to run it as: "
            "start this as another user"
        ) from None
    return ["setpriv", f"--reuid={NAME}", f"--regid={NAME}", "--clear-groups"]


def password(folder: Path) -> str:
    """The cluster's password, made up at first; only this user can read it."""
    path = folder / "password"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_private(path.with_suffix(".new"), secrets.token_urlsafe(24)).replace(path)
    return path.read_text()


def _write_private(path: Path, text: str) -> Path:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(handle, "w") as file:
        file.write(text)
    return path


def make_cluster(folder: Path, log: Path) -> Path:
    """The data folder, made at first. Raises StackError with what `initdb` says."""
    data = folder / "postgres"
    if (data / "PG_VERSION").exists():
        return data
    shutil.rmtree(data, ignore_errors=True)  # what an initdb that was killed has left
    data.mkdir(parents=True, mode=0o700)
    if as_owner():
        shutil.chown(data, NAME, NAME)
    # `initdb` opens the file by name, as whoever it runs as.
    given = folder / "initdb-password"
    _write_private(given, password(folder))
    if as_owner():
        shutil.chown(given, NAME, NAME)
    argv = [*as_owner(), str(programs() / "initdb"), "--pgdata", str(data), "--username", USER]
    argv += ["--auth", "scram-sha-256", "--encoding", "UTF8", "--no-locale", f"--pwfile={given}"]
    try:
        with log.open("ab") as out:
            done = subprocess.run(argv, stdout=out, stderr=subprocess.STDOUT, cwd="/")
    finally:
        given.unlink()
    if done.returncode:
        shutil.rmtree(data, ignore_errors=True)
        raise StackError(f"initdb: {last_line(log)} (see {log}); MTA_NATIVE is where it works")
    return data


def command(data: Path, port: int) -> list[str]:
    """The server: no sockets in shared folders, one address."""
    argv = [*as_owner(), str(programs() / "postgres"), "-D", str(data), "-p", str(port)]
    for setting in (f"listen_addresses={HOST}", "unix_socket_directories=", "max_connections=200"):
        argv += ["-c", setting]
    return argv


def url(folder: Path, port: int, database: str, driver: str = "postgresql") -> str:
    """The database's address, password and all: for environments, not for logs."""
    return f"{driver}://{USER}:{password(folder)}@{HOST}:{port}/{database}"


def accepts(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0


def make_databases(folder: Path, port: int, names: Iterable[str] = DATABASES) -> None:
    asyncio.run(_make_databases(url(folder, port, "postgres"), names))


async def _make_databases(address: str, names: Iterable[str]) -> None:
    import asyncpg

    # It takes connections a moment before it serves them.
    for pause in (0.2, 0.5, 1.0, 2.0, 5.0, None):
        try:
            connection = await asyncpg.connect(address)
            break
        except asyncpg.CannotConnectNowError:
            if pause is None:
                raise StackError("PostgreSQL does not serve: see its log") from None
            await asyncio.sleep(pause)
    try:
        rows: list[Mapping[str, str]] = await connection.fetch("SELECT datname FROM pg_database")
        for name in set(names) - {row["datname"] for row in rows}:
            await connection.execute(f'CREATE DATABASE "{name}"')
    finally:
        await connection.close()

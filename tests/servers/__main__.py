"""Run a command with a PostgreSQL and an S3 server of its own, which end with it:

    python -m tests.servers bash -c 'make benchmark EXTRAS=test && make stop'

The environment leads the local stack there. The servers listen on 127.0.0.1, and what they hold is
gone when they end. PostgreSQL comes from the system's packages. It does not run as root: then it
runs as the user `postgres`. The S3 server is moto's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

from infra.local.processes import free_port

HOST = "127.0.0.1"
USER = "mta"
DATABASES = ("prefect", "mlflow")
BUCKETS = ("mta", "mlflow")


def why_not() -> str | None:
    """Why PostgreSQL cannot run on this machine, in one line, or None."""
    if programs() is None:
        return "PostgreSQL is not installed: install the package `postgresql`"
    if os.geteuid() == 0 and "postgres" not in {user.pw_name for user in pwd.getpwall()}:
        return "PostgreSQL does not run as root, and there is no user `postgres`"
    return None


def programs() -> Path | None:
    """The folder of `initdb` and `pg_ctl`, if they are installed."""
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).resolve().parent
    # Debian keeps each version in a folder of its own, off the path.
    folders = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    return max(folders, key=lambda folder: float(folder.parent.name), default=None)


@contextlib.contextmanager
def servers() -> Iterator[dict[str, str]]:
    """Both servers; the environment that leads the local stack there, passwords and all."""
    with postgres() as database, s3() as storage:
        yield {
            "MTA_PREFECT_DATABASE": database.replace("://", "+asyncpg://") + "prefect",
            "MTA_MLFLOW_DATABASE": database + "mlflow",
            "MTA_MLFLOW_ARTIFACTS": "s3://mlflow/artifacts",
            **storage,
        }


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL cluster that asks for a password; its address, up to the database's name."""
    port, password = free_port(5432), secrets.token_urlsafe(24)
    # Not below pytest's folder, which only its owner may enter: the user `postgres` must.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        secret, data = folder / "password", folder / "data"
        secret.touch(mode=0o600)
        secret.write_text(password)
        if os.geteuid() == 0:
            for path in (folder, secret):
                shutil.chown(path, "postgres", "postgres")
        run("initdb", "-D", data, "-U", USER, "-A", "scram-sha-256", "-E", "UTF8",
            "--no-locale", f"--pwfile={secret}")  # fmt: skip
        # No sockets in shared folders, one address.
        options = f"-p {port} -h {HOST} -c unix_socket_directories= -c max_connections=200"
        run("pg_ctl", "start", "-w", "-D", data, "-l", folder / "log", "-o", options)
        try:
            for database in DATABASES:
                run("createdb", "-h", HOST, "-p", port, "-U", USER, database, PGPASSWORD=password)
            yield f"postgresql://{USER}:{password}@{HOST}:{port}/"
        finally:
            run("pg_ctl", "stop", "-w", "-m", "fast", "-D", data)


def run(program: str, *arguments: object, **variables: str) -> None:
    """Run a program of PostgreSQL, as a user that it accepts."""
    owner = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    command = [*(owner if os.geteuid() == 0 else []), f"{programs()}/{program}", *arguments]
    # Where that user may be; and with no pipe that the server would keep open.
    subprocess.run(
        [str(part) for part in command],
        cwd="/", env=os.environ | variables, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        check=True,
    )  # fmt: skip


@contextlib.contextmanager
def s3() -> Iterator[dict[str, str]]:
    """moto's S3 server, which keeps everything in memory; its environment, for boto3 and MLflow."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would print every request
    server = ThreadedMotoServer(HOST, 0, verbose=False)
    server.start()
    address = f"http://{HOST}:{server.get_host_and_port()[1]}"
    # Any keys will do: moto checks none.
    keys = {"AWS_ACCESS_KEY_ID": "mta", "AWS_SECRET_ACCESS_KEY": "mta"}
    region = {"AWS_DEFAULT_REGION": "us-east-1"}
    try:
        client = boto3.client(
            "s3", endpoint_url=address, region_name="us-east-1",
            aws_access_key_id="mta", aws_secret_access_key="mta",
        )  # fmt: skip
        for name in BUCKETS:
            client.create_bucket(Bucket=name)
        yield {"AWS_ENDPOINT_URL": address, "MLFLOW_S3_ENDPOINT_URL": address, **keys, **region}
    finally:
        server.stop()


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(f"mta: {reason}")
    with servers() as environment:
        code = subprocess.call(sys.argv[1:], env=os.environ | environment)
    sys.exit(code)

"""The whole embedded benchmark on PostgreSQL and S3, started by `python -m infra.native`."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.local.settings import StackError
from infra.native import postgres, s3
from tasks.methods import METHODS
from tasks.options import SYNTHETIC_TASKS
from tests.flows.test_stack import ROOT, environment
from tests.small import SMALL

# All tasks and all methods, with budgets as small as they go.
GIVEN: dict[str, Any] = SMALL | {
    "lamp_tasks": list(SYNTHETIC_TASKS),
    "methods": list(METHODS),
}


def why_not() -> str | None:
    """Why it cannot run on this machine, in one line, or None."""
    try:
        postgres.programs()
        postgres.as_owner()
        s3.command(0)
    except StackError as error:
        return str(error)
    if importlib.util.find_spec("psycopg2") is None:
        return "psycopg2 is not installed: pip install -e '.[test]'"
    return None


@pytest.fixture
def native() -> Iterator[dict[str, str]]:
    """Both services, and the environment that leads there.

    Not below pytest's folder, which only its owner may enter: the user `postgres` must.
    """
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        env = environment() | {"MTA_NATIVE": str(folder)}
        try:
            up = command(["infra.native", "up"], ROOT, env)
            assert up.returncode == 0, up.stderr
            words = shlex.split(up.stdout)
            assert words[::2] == ["export"] * (len(words) // 2)
            yield env | dict(word.split("=", 1) for word in words[1::2])
        finally:
            down = command(["infra.native", "down"], ROOT, env)
            assert down.returncode == 0, down.stderr


def command(
    argv: list[str], folder: Path, env: dict[str, str], timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *argv],
        cwd=folder, env=env, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


async def rows(address: str, query: str) -> list[tuple[Any, ...]]:
    import asyncpg

    connection = await asyncpg.connect(address.replace("+asyncpg", ""))
    try:
        return [tuple(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmark_on_postgres_and_s3(native: dict[str, str], tmp_path: Path) -> None:
    project = tmp_path / "project"
    for name in ("flows", "tasks", "infra"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "prefect.yaml", project)
    given = [part for k, v in GIVEN.items() for part in ("-p", f"{k}={json.dumps(v)}")]
    try:
        done = command(["infra.local", "benchmark", *given], project, native, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        command(["infra.local", "down"], project, native)
    states = asyncio.run(
        rows(native["MTA_PREFECT_DATABASE"], "SELECT name, state_type FROM flow_run")
    )
    # The schedule's next runs stand there as well.
    states = [state for _, state in states if state != "SCHEDULED"]
    assert states == ["COMPLETED"] * (1 + len(SYNTHETIC_TASKS))
    kinds = asyncio.run(
        rows(
            native["MTA_MLFLOW_DATABASE"],
            "SELECT value, count(*) FROM tags JOIN runs USING (run_uuid) "
            "WHERE key = 'kind' AND status = 'FINISHED' GROUP BY value",
        )
    )
    methods = len(SYNTHETIC_TASKS) * len(METHODS)
    assert dict(kinds)["benchmark"] == 1
    assert dict(kinds)["method"] == methods
    names = artifacts(native)
    assert sum(name.endswith("/predictions.parquet") for name in names) == methods
    assert sum(name.endswith("/report.html") for name in names) == 1
    # Nothing of it lies in files that a cluster would not see.
    assert not list((project / ".mta").rglob("*.db"))
    assert not (project / ".mta" / "mlflow" / "artifacts").exists()
    logs = "".join(path.read_text() for path in (project / ".mta").rglob("*.log"))
    assert postgres.password(Path(native["MTA_NATIVE"])) not in logs


def artifacts(env: dict[str, str]) -> list[str]:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        region_name=env["AWS_DEFAULT_REGION"],
    )
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="mlflow")
    return [found["Key"] for page in pages for found in page.get("Contents", [])]


def test_a_second_start_keeps_both(native: dict[str, str]) -> None:
    """And a password is only in a file that nobody else can read."""
    folder = Path(native["MTA_NATIVE"])
    pids = [json.loads((folder / f"{name}.json").read_text())["pid"] for name in ("postgres", "s3")]
    again = command(["infra.native", "up"], ROOT, native)
    assert again.returncode == 0, again.stderr
    assert "starting" not in again.stderr
    assert pids == [
        json.loads((folder / f"{name}.json").read_text())["pid"] for name in ("postgres", "s3")
    ]
    assert (folder / "password").stat().st_mode & 0o077 == 0
    assert os.environ.get("MTA_PREFECT_DATABASE") is None
    for path in folder.glob("*.json"):
        assert postgres.password(folder) not in path.read_text()

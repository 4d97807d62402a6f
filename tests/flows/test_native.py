"""The benchmark on PostgreSQL and S3 (tests/servers)."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.flows.test_stack import copy_project, environment
from tests.servers.__main__ import servers, why_not
from tests.small import SMALL

# Two LaMP tasks at once. All methods: tests/unit/stages/test_own_task.py; what they keep in a store
# at a URL, tests/unit/results/test_whole_path.py.
GIVEN: dict[str, Any] = SMALL | {"lamp_tasks": ["LaMP-2M", "LaMP-4"]}


def stack(
    arguments: list[str], folder: Path, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "infra.local", *arguments],
        cwd=folder, env=env, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip


async def rows(address: str, query: str) -> list[tuple[Any, ...]]:
    import asyncpg

    connection = await asyncpg.connect(address.replace("+asyncpg", ""))
    try:
        return [tuple(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.skipif(importlib.util.find_spec("psycopg2") is None, reason="needs psycopg2")
def test_the_benchmark_on_postgres_and_s3(tmp_path: Path) -> None:
    with servers() as addresses:
        in_servers(tmp_path / "project", environment() | addresses)


def in_servers(project: Path, native: dict[str, str]) -> None:
    copy_project(project)
    given = [part for k, v in GIVEN.items() for part in ("-p", f"{k}={json.dumps(v)}")]
    try:
        done = stack(["benchmark", *given], project, native)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        stack(["down"], project, native)
    states = asyncio.run(
        rows(native["MTA_PREFECT_DATABASE"], "SELECT name, state_type FROM flow_run")
    )
    # The schedule's next runs stand there as well.
    states = [state for _, state in states if state != "SCHEDULED"]
    assert states == ["COMPLETED"]
    kinds = asyncio.run(
        rows(
            native["MTA_MLFLOW_DATABASE"],
            "SELECT value, count(*) FROM tags JOIN runs USING (run_uuid) "
            "WHERE key = 'kind' AND status = 'FINISHED' GROUP BY value",
        )
    )
    methods = len(GIVEN["lamp_tasks"]) * len(GIVEN["methods"])
    assert dict(kinds)["benchmark"] == 1
    assert dict(kinds)["method"] == methods
    names = artifacts(native)
    assert sum(name.endswith("/predictions.parquet") for name in names) == methods
    assert sum(name.endswith("/report.html") for name in names) == 1
    # Nothing of it lies in files that a cluster would not see.
    assert not list((project / ".mta").rglob("*.db"))
    assert not (project / ".mta" / "mlflow" / "artifacts").exists()
    logs = "".join(path.read_text() for path in (project / ".mta").rglob("*.log"))
    password = native["MTA_MLFLOW_DATABASE"].split(":")[2].split("@")[0]
    assert len(password) > 20
    assert password not in logs


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

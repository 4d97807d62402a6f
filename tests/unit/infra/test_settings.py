"""The stack's environment and the `prefect.toml` it writes."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from infra.local.settings import (
    Layout,
    StackError,
    client_environment,
    mlflow_environment,
    prefect_environment,
    write_prefect_toml,
)


def toml(layout: Layout, port: int | None) -> dict[str, Any]:
    layout.root.mkdir(exist_ok=True)
    write_prefect_toml(layout, port)
    return tomllib.loads(layout.prefect_toml.read_text())


def test_prefect_toml_is_what_prefect_needs_from_a_second_shell(tmp_path: Path) -> None:
    layout = Layout(tmp_path / 'a "quoted" folder')
    read = toml(layout, 4321)
    assert read["api"]["url"] == "http://127.0.0.1:4321/api"
    assert read["home"] == str(layout.prefect_home)
    assert read["server"]["analytics_enabled"] is False
    assert read["worker"]["query_seconds"] == 2
    assert read["server"]["concurrency"]["lease_storage"].endswith(".filesystem")


def test_prefect_toml_names_no_server_when_the_stack_is_down(tmp_path: Path) -> None:
    read = toml(Layout(tmp_path), None)
    assert "api" not in read
    # Nor does Prefect start one of its own on the project's database.
    assert read["server"]["ephemeral"]["enabled"] is False
    assert read["server"]["analytics_enabled"] is False


def test_prefect_reads_every_setting_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that Prefect does not know would be ignored without a word."""
    from prefect.settings import Settings

    for name in ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_SERVER_ANALYTICS_ENABLED"):
        monkeypatch.delenv(name, raising=False)
    # Under pytest Prefect's own test mode may be on, where it reads no files.
    for name in ("PREFECT_TEST_MODE", "PREFECT_UNIT_TEST_MODE"):
        monkeypatch.delenv(name, raising=False)
    layout = Layout(tmp_path)
    write_prefect_toml(layout, 4321)
    monkeypatch.chdir(tmp_path)
    settings = Settings()
    assert settings.api.url == "http://127.0.0.1:4321/api"
    assert settings.home == layout.prefect_home
    assert settings.server.analytics_enabled is False
    assert settings.server.concurrency.lease_storage.endswith(".filesystem")
    assert settings.server.concurrency.maximum_concurrency_slot_wait_seconds == 5
    assert settings.server.deployments.concurrency_slot_wait_seconds == 5
    for service in ("task_run_recorder", "event_persister"):
        assert getattr(settings.server.services, service).batch_size == 200
        assert getattr(settings.server.services, service).flush_interval == 1
    assert settings.worker.query_seconds == 2
    assert settings.worker.heartbeat_seconds == 10


def test_the_users_own_prefect_does_not_leak_into_the_stack(tmp_path: Path) -> None:
    environ = {
        "PREFECT_API_URL": "https://elsewhere.example/api",
        "PREFECT_API_KEY": "secret",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql://elsewhere",
        "PREFECT_LOGGING_LEVEL": "DEBUG",
        "HTTP_PROXY": "http://proxy.example:8080",
        "NO_PROXY": "example.org",
        "PATH": "/usr/bin",
    }
    env = client_environment(
        Layout(tmp_path), environ, prefect_port=4321, mlflow_uri="http://127.0.0.1:5432"
    )
    assert env["PREFECT_API_URL"] == "http://127.0.0.1:4321/api"
    assert "PREFECT_API_KEY" not in env
    assert "PREFECT_SERVER_DATABASE_CONNECTION_URL" not in env
    assert env["PREFECT_LOGGING_LEVEL"] == "DEBUG"
    assert env["NO_PROXY"] == "example.org,127.0.0.1,localhost"


def test_what_a_flow_run_may_rely_on(tmp_path: Path) -> None:
    env = client_environment(
        Layout(tmp_path), {}, prefect_port=4200, mlflow_uri="http://127.0.0.1:5000"
    )
    assert env["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert env["MTA_ROOT"] == str(tmp_path)
    assert env["MTA_STORE"] == str(tmp_path / ".mta" / "store")
    assert env["TOKENIZERS_PARALLELISM"] == "false"
    assert env["DO_NOT_TRACK"] == "1"
    assert env["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert env["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert env["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


@pytest.mark.parametrize("given", ["s3://bucket/prefix", "", "own"])
def test_a_store_at_a_url_is_the_users(tmp_path: Path, given: str) -> None:
    """Reports and runs stay below .mta in either case: the cache lies there."""
    own = str(tmp_path / ".mta" / "store")
    env = client_environment(
        Layout(tmp_path),
        {"MTA_STORE": own if given == "own" else given, "MTA_STORE_CACHE": ""},
        prefect_port=4200,
        mlflow_uri="http://127.0.0.1:5000",
    )
    assert env["MTA_STORE"] == (given if "://" in given else own)
    assert env["MTA_STORE_CACHE"] == str(tmp_path / ".mta" / "cache")


@pytest.mark.parametrize("given", ["file:///mnt/x", "/mnt/x", "elsewhere"])
def test_a_store_in_a_folder_elsewhere_is_refused(tmp_path: Path, given: str) -> None:
    """This stack does not take it; it is not passed over in silence."""
    with pytest.raises(StackError, match=rf"^MTA_STORE {given}: it is .*store for this .* unset"):
        client_environment(Layout(tmp_path), {"MTA_STORE": given}, prefect_port=1, mlflow_uri="x")


def test_a_cache_elsewhere_is_refused(tmp_path: Path) -> None:
    """Reports, runs and spool lie beside it, where the stack would not find them."""
    layout, given = Layout(tmp_path), {"MTA_STORE": "s3://b/p", "MTA_STORE_CACHE": "/mnt/fast"}
    with pytest.raises(StackError, match=r"^MTA_STORE_CACHE /mnt/fast: it is .*cache for .* unset"):
        client_environment(layout, given, prefect_port=1, mlflow_uri="x")
    own = given | {"MTA_STORE_CACHE": str(layout.cache)}
    env = client_environment(layout, own, prefect_port=1, mlflow_uri="x")
    assert env["MTA_STORE_CACHE"] == str(layout.cache)
    # Of a store in a folder there is no cache.
    unused = {"MTA_STORE_CACHE": "/mnt/fast"}
    assert client_environment(layout, unused, prefect_port=1, mlflow_uri="x")["MTA_STORE"] == str(
        layout.store
    )


def test_servers_are_on_files_unless_told_otherwise(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    given = {"MLFLOW_TRACKING_URI": "http://elsewhere"}
    assert "PREFECT_SERVER_DATABASE_CONNECTION_URL" not in prefect_environment(layout, given)
    env = mlflow_environment(layout, given)
    assert env["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{tmp_path}/.mta/mlflow/mlflow.db"
    assert env["MLFLOW_ARTIFACTS_DESTINATION"] == f"{tmp_path}/.mta/mlflow/artifacts"
    assert "MLFLOW_TRACKING_URI" not in env


def test_each_server_gets_its_own_database_and_no_run_gets_either(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    given = {
        "MTA_PREFECT_DATABASE": "postgresql+asyncpg://mta:one@db/prefect",
        "MTA_MLFLOW_DATABASE": "postgresql://mta:two@db/mlflow",
        "MTA_MLFLOW_ARTIFACTS": "s3://mlflow/artifacts",
        "AWS_ENDPOINT_URL": "http://s3:9000",
    }
    server, mlflow = prefect_environment(layout, given), mlflow_environment(layout, given)
    run = client_environment(layout, given, prefect_port=1, mlflow_uri="http://127.0.0.1:2")
    assert server["PREFECT_SERVER_DATABASE_CONNECTION_URL"] == given["MTA_PREFECT_DATABASE"]
    assert mlflow["MLFLOW_BACKEND_STORE_URI"] == given["MTA_MLFLOW_DATABASE"]
    assert mlflow["MLFLOW_ARTIFACTS_DESTINATION"] == "s3://mlflow/artifacts"
    assert ":two@" not in " ".join(server.values())
    assert ":one@" not in " ".join(mlflow.values())
    assert not [value for value in run.values() if ":one@" in value or ":two@" in value]
    # The store may be there, too.
    assert run["AWS_ENDPOINT_URL"] == "http://s3:9000"

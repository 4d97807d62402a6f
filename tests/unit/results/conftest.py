"""An S3 server on this machine, and stores of one URL as several machines see them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from tasks.results.remote import Remote
from tasks.results.store import Store

Machine = Callable[..., Store]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a moto server; not of AWS, whatever the environment says."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    pytest.importorskip("s3fs")
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A URL in a bucket of the test's own."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"mta-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield f"s3://{bucket}/some/prefix"
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    return f"memory://{uuid.uuid4().hex}/store"


@pytest.fixture
def machine(url: str, tmp_path: Path) -> Machine:
    """`machine(name)`: the store at `url` with the cache of one machine."""

    def of(name: str = "one") -> Store:
        return Store(tmp_path / name / "cache", Remote(url))

    return of

"""What tests of several folders share: where they run, and what takes seconds to make."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import certifi
import pytest

END = "-----END CERTIFICATE-----\n"
# Before torch is imported. The models are so small that threads only wait for each other, and tests
# run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, to copy: to make them takes longer than a test."""
    from mlflow import MlflowClient  # most tests need no MLflow

    file = tmp_path_factory.mktemp("tables") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture(scope="session")
def prefect_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A database with Prefect's tables, to copy: that of a server, as it began.

    The server stands behind all flows of the process from here on.
    """
    from prefect.settings import (
        PREFECT_API_SSL_CERT_FILE,
        PREFECT_SERVER_DATABASE_CONNECTION_URL,
        temporary_settings,
    )
    from prefect.testing.utilities import prefect_test_harness

    folder = tmp_path_factory.mktemp("tables")
    file = folder / "prefect.db"
    # Each of Prefect's clients, some per task run, would read all certificates that there are.
    certificate = Path(certifi.where()).read_text().partition(END)
    (folder / "one.pem").write_text("".join(certificate[:2]))
    with (
        temporary_settings({PREFECT_API_SSL_CERT_FILE: str(folder / "one.pem")}),
        prefect_test_harness(server_startup_timeout=600),
    ):
        url = str(PREFECT_SERVER_DATABASE_CONNECTION_URL.value())
        with (
            closing(sqlite3.connect(url.removeprefix("sqlite+aiosqlite:///"))) as own,
            closing(sqlite3.connect(file)) as copy,
        ):
            own.backup(copy)
        yield file

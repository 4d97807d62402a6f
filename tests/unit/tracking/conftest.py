"""A store of the test's own, and an MLflow in a SQLite file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.unit.tracking import run_case


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables: to make them takes longer than a test."""
    file = tmp_path_factory.mktemp("tables") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def uri(tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The MLflow of a test, whose store is empty and whose tables are stubs."""
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "mta" / "store"))
    shutil.copy(tables, tmp_path / "mlflow.db")
    found = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", found)
    run_case.stub_report(monkeypatch)
    return found

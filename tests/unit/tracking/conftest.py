"""A store of the test's own, and an MLflow in a SQLite file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.unit.tracking import run_case


@pytest.fixture
def uri(tmp_path: Path, mlflow_tables: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The MLflow of a test, whose store is empty and whose tables are stubs."""
    monkeypatch.setenv("MTA_STORE", str(tmp_path / "mta" / "store"))
    shutil.copy(mlflow_tables, tmp_path / "mlflow.db")
    found = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", found)
    run_case.stub_report(monkeypatch)
    return found

"""What tests of several folders share: where they run, and what takes seconds to make."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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

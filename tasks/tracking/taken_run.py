"""A finished run, by its name, or a registered bank as one (`registry`), fetched from MLflow."""

import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tasks.errors import InputError, masked, short
from tasks.record import File
from tasks.report.files import read_run
from tasks.results.run import Run
from tasks.results.store import store
from tasks.tracking.registry import ARTIFACT, NAME, RUN_PATH, SCHEME, STORE_FOLDER, needed
from tasks.tracking.server import Mlflow, known_mlflow


def run_of(wanted: str, base: str | None = None) -> Run:
    """A run as `read_run` gives it, or of a version, as `models:/mta-bank/3` or `...@champion`.

    What of a version's files the store has not is fetched from MLflow. base: where its base model
    lies on this machine, if not where the run had it. Raises InputError where there is no such run.
    """
    if not wanted.startswith(SCHEME):
        run = read_run(wanted)
    else:
        mlflow = known_mlflow()
        try:
            run = _fetched(mlflow, wanted)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"--run {wanted}: MLflow at {masked(mlflow.uri)} does not give it ({short(error)})"
            ) from error
    return with_base(run, base)


def with_base(run: Run, base: str | None) -> Run:
    """A run whose base model lies elsewhere on this machine; None: where the run had it."""
    if base is None:
        return run
    cells = [
        cell.model_copy(update={"base": cell.base.model_copy(update={"model": base})})
        for cell in run.cells
    ]
    return run.model_copy(update={"cells": tuple(cells)})


def _fetched(mlflow: Mlflow, wanted: str) -> Run:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    place = model_place(mlflow, wanted)
    files: Any = get_artifact_repository(place, tracking_uri=mlflow.uri)
    with tempfile.TemporaryDirectory() as scratch:
        read = Path(files.download_artifacts(RUN_PATH, scratch))
        try:
            run = Run.model_validate_json(read.read_bytes())
        except ValidationError as error:
            raise InputError(
                f"--run {wanted}: cannot be read as a bank ({error.errors()[0]['msg']}); another "
                "version of this program wrote it"
            ) from error
    for file in needed(run):
        store().bring(file, partial(_download, files, file))
    return run


def model_place(mlflow: Mlflow, wanted: str) -> str:
    """Where the artifacts of a registered version lie."""
    match = re.fullmatch(rf"{SCHEME}([^/@]+)(?:/(\d+)|@([\w-]+))", wanted)
    if not match:
        raise InputError(f"--run {wanted}: write {SCHEME}{NAME}/3 or {SCHEME}{NAME}@champion")
    name, number, alias = match.groups()
    client = mlflow.client
    if alias:
        number = client.get_model_version_by_alias(name, alias).version
    return str(client.get_model_version_download_uri(name, number))


def _download(files: Any, file: File, scratch: Path) -> Path:
    return Path(
        files.download_artifacts(f"artifacts/{ARTIFACT}/{STORE_FOLDER}/{file.uri}", str(scratch))
    )

"""The banks of runs in MLflow's model registry: each is a version of the model `mta-bank`.

    mlflow.pyfunc.load_model("models:/mta-bank/3").predict(users)
    mta personalise --run models:/mta-bank@champion --user new.json

A version is a model from code (tasks/personalise/bank_model.py) with one folder of artifacts:

    artifacts/bank/run.json      settings, base model by id and hash, anchors: a run of one cell
    artifacts/bank/store/...     the files it points to, as they lie in a store

Nothing in it is a text of a user, and few-shot users are not named.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config.options import ComputeOptions
from tasks.config.task import flat
from tasks.embed import TABLE, measured
from tasks.methods import METHODS, MethodName
from tasks.record import File, files_of, key_of
from tasks.results.models import Embedded, Training
from tasks.results.run import Cell, Merging, Run
from tasks.results.store import MAKING, Store, store
from tasks.text.loading import LIBRARIES, model_name
from tasks.text.questions import shown_prompt
from tasks.tracking.server import Mlflow, all_pages

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

NAME = "mta-bank"
CODE = Path(__file__).parents[1] / "personalise" / "bank_model.py"
# Raised when a version holds other things than before.
VERSION = 1
SCHEME = "models:/"
ARTIFACT, RUN_FILE, STORE_FOLDER = "bank", "run.json", "store"
RUN_PATH = f"artifacts/{ARTIFACT}/{RUN_FILE}"
ABOUT = (
    "Banks of anchors' LoRAs, which give a new user a LoRA from a few items: "
    f"`mta personalise --run {SCHEME}{NAME}/1 --user new.json`, or "
    f'`mlflow.pyfunc.load_model("{SCHEME}{NAME}/1").predict(users)`.'
)


def register(mlflow: Mlflow, run_id: str, run: Run) -> None:
    """Make the bank of each cell a version, and give it the cell's alias and `run_id` its tag.

    One that is there already, of an earlier run, is not made again. run_id: in MLflow.
    """
    for cell in run.cells:
        if (method := new_users_method(cell)) is None:
            continue
        known = versions(mlflow, f"tags.content = '{_content(cell, method)}'")
        number = known[0].version if known else _new_version(mlflow, run_id, run, cell, method)
        alias = re.sub(r"\W+", "-", cell.name)
        mlflow.client.set_registered_model_alias(NAME, alias, str(number))
        mlflow.client.set_tag(run_id, f"{NAME}.{alias}", f"{SCHEME}{NAME}/{number}")


def new_users_method(cell: Cell) -> MethodName | None:
    """The method that new users get: `mta`, or the last that merges and trains on top."""
    able = [name for one in cell.mergings for name in one.methods if METHODS[name].for_new_users]
    able.sort(key=lambda name: (name == "mta", METHODS[name].trained is not None))
    return able[-1] if able else None


def _content(cell: Cell, method: MethodName) -> str:
    """What decides a version."""
    merging = cell.merging(method)
    assert merging is not None
    settings = cell.config.method(method)
    return key_of(VERSION, cell.base, merging.merged.bank, merging.embedded, settings)


def versions(mlflow: Mlflow, query: str = "") -> list[ModelVersion]:
    """All versions of `mta-bank`, or those that a query finds."""
    asked = " and ".join(filter(None, (f"name = '{NAME}'", query)))
    return all_pages(partial(mlflow.client.search_model_versions, asked))


def _new_version(mlflow: Mlflow, run_id: str, run: Run, cell: Cell, method: MethodName) -> str:
    """The number of a new version. Large files go from the store to MLflow without a copy."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    client, config = mlflow.client, cell.config
    tags = {
        "run": run.name,
        "prefect_flow_run": run.id,
        "lamp_task": config.lamp_task,
        "seed": str(config.seed),
        "method": method,
        "base": model_name(cell.base.model),
        "base_content": cell.base.content,
        "content": _content(cell, method),
    }
    settings = flat(config.method(method).model_dump(mode="json"))
    params = {name: str(value)[:500] for name, value in settings.items()}
    model = client.create_logged_model(mlflow.experiment, NAME, run_id, tags, params, "mta")
    with tempfile.TemporaryDirectory() as scratch:
        bank = Path(scratch) / ARTIFACT
        made = _portable(run, cell, method, Store(bank / STORE_FOLDER))
        (bank / RUN_FILE).write_text(made.model_dump_json() + "\n", encoding="utf-8")
        folder = Path(scratch) / "model"
        _save(folder, bank, made.cells[0], method, model.model_id, run_id)
        client.log_model_artifacts(model.model_id, str(folder))
        for file in needed(made):
            if not (bank / STORE_FOLDER / file.uri).exists():
                place = Path("artifacts", ARTIFACT, STORE_FOLDER, file.uri)
                path = str(store().path(file))
                if Path(path).is_dir():
                    client.log_model_artifacts(model.model_id, path, place.as_posix())
                else:
                    client.log_model_artifact(model.model_id, path, place.parent.as_posix())
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    with suppress(MlflowException):  # it is there; else the next call says what is wrong
        client.create_registered_model(NAME, description=ABOUT)
    # Not by the model's id: a registry in a file looks that up in MLflow's global address.
    source, tags = model.artifact_location, tags | {"model_id": model.model_id}
    version = client.create_model_version(NAME, source, run_id, tags, model_id=model.model_id)
    return str(version.version)


def needed(run: Run) -> list[File]:
    """The files that personalise new users: base model, adapter of the task, bank, vectors."""
    (cell,) = run.cells
    (merging,) = cell.mergings
    embedded = merging.embedded
    return list(files_of(cell.base, merging.merged.bank.file, embedded.table, embedded.whitening))


def _portable(run: Run, cell: Cell, method: MethodName, place: Store) -> Run:
    """What of a run personalises new users, without the run's own users but the bank's.

    place: where the table of the bank's vectors is written.
    """
    merging = cell.merging(method)
    assert merging is not None
    bank = merging.merged.bank
    members = tuple(one.model_copy(update={"training": Training()}) for one in bank.members)
    bank = bank.model_copy(update={"members": members, "map": None})
    kept = Merging(
        methods=merging.methods,
        embedded=_bank_vectors(merging, place),
        chosen=None,
        merged=merging.merged.model_copy(update={"bank": bank}),
    )
    users: dict[str, Any] = {"optimum": None, "population": None, "few_shot_ids": (), "audit": {}}
    scores = {"scored": (), "draws": None}
    alone = Cell(
        # Where it ran says nothing of where new users are made.
        config=cell.config.model_copy(update={"compute": ComputeOptions()}),
        users=cell.users.model_copy(update=users),
        base=cell.base,
        mergings=(kept,),
        answers={},
        compared=cell.compared.model_copy(update=scores),
    )
    return run.model_copy(update={"cells": (alone,), "overall": None, "missing": (), "summary": ()})


def _bank_vectors(merging: Merging, place: Store) -> Embedded:
    """The vectors of the bank's users, and the centre of the population as its only base user."""
    import polars as pl

    embedded = merging.embedded
    sides, _ = measured(embedded)
    wanted = {user for member in merging.merged.bank.members for user in member.members}
    rows: list[tuple[str, str, list[float]]] = []
    if embedded.centred:
        population = sides["base"] if sides["base"][0] else sides["anchor"]
        rows.append(("base", "centre", population[1].mean(0).tolist()))
    pairs = zip(*sides["anchor"], strict=True)
    rows += [("anchor", name, vector.tolist()) for name, vector in pairs if name in wanted]
    kinds: Any = {"role": pl.String, "user_id": pl.String, "vector": pl.List(pl.Float64)}
    with place.new("registered") as folder:
        pl.DataFrame(rows, kinds, orient="row").write_parquet(folder.path / TABLE)
    shutil.rmtree(place.root / MAKING)
    return embedded.model_copy(update={"table": folder.file(TABLE), "users": len(rows)})


def _save(
    folder: Path, bank: Path, cell: Cell, method: MethodName, model_id: str, run_id: str
) -> None:
    """Write a version's model: its code, `bank`, signature and requirements."""
    import mlflow.pyfunc
    from mlflow.models import Model

    config, task = cell.config.method(method), cell.users.task
    about = {
        "lamp_task": task.name,
        "method": method,
        "fields": [task.text_field, task.answer_field],
        "labels": list(task.labels),
        "prompt": shown_prompt(config.prompt, cell.users, config.base.model),
    }
    item = {"id": "1", task.text_field: "...", task.answer_field: (*task.labels, "...")[0]}
    # MLflow advises type hints, and would make another signature of them. No filter stops it.
    with warnings.catch_warnings(record=True):
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(CODE),
            artifacts={ARTIFACT: str(bank)},
            mlflow_model=Model(run_id=run_id, model_id=model_id, metadata=about),
            signature=_signature(),
            input_example=[{"user_id": "u1", "profile": [item]}],
            # Given: MLflow would load the model to find them out.
            pip_requirements=[
                f"{name}=={metadata.version(name)}" for name in ("mta", "mlflow", *LIBRARIES)
            ],
            model_config={"base": None, "to": "personalised"},
        )


def _signature() -> ModelSignature:
    """Users as in a user file, without queries; for each the recipe or the folder."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Map

    text, number = DataType.string, DataType.double
    users: list[Any] = [ColSpec(text, "user_id"), ColSpec(Array(Map(text)), "profile")]
    made: list[Any] = [
        ColSpec(text, "user_id"),
        ColSpec(Array(text), "anchors", required=False),
        ColSpec(Array(number), "weights", required=False),
        ColSpec(text, "folder", required=False),
        ColSpec(text, "error", required=False),
    ]
    ways = [ParamSpec("keep", text, "recipe")]
    return ModelSignature(Schema(users), Schema(made), ParamSchema(ways))

"""A user to forget, in MLflow, and in Prefect: flow runs, with their task runs and logs."""

import tempfile
from collections.abc import Iterable, Iterator, Set
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from infra.local.alone import local_server
from tasks.errors import label, masked, short
from tasks.forget.closure import WRITTEN, Marks, holds
from tasks.record import files_of
from tasks.results.run import Run
from tasks.tracking import registry
from tasks.tracking.server import PARENT_TAG, Mlflow

SEARCHED = (".parquet", ".json", *WRITTEN)
# Made of the same users as the tables beside them, without a name in them.
NAMELESS = ("map.png", "golds.json", ".html")


@dataclass(frozen=True)
class Sought:
    """What is searched for in MLflow.

    anchors: whose LoRAs go, and their runs with them. flow_runs: whose answers were made with such
    LoRAs, so that all their tables go. learned: stored folders that no bank may be made of.
    """

    marks: Marks
    anchors: Set[str] = frozenset()
    flow_runs: Set[str] = frozenset()
    learned: Set[str] = frozenset()


@dataclass
class Traces:
    """What MLflow has of a user, and which servers cannot be searched, in lines."""

    runs: int = 0
    lines: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    flow_runs: set[str] = field(default_factory=set)  # Prefect's, that logged it


def traces_in_mlflow(uris: Iterable[str], sought: Sought, remove: bool = False) -> Traces:
    """Search all runs and registered banks, and remove at once what they have of a user.

    Metrics stay, and parameters, which MLflow does not take back.
    """
    traces = Traces()
    for uri in uris:
        try:
            _search(Mlflow(uri), traces, sought, remove)
            _search_banks(Mlflow(uri), traces, sought, remove)
        except Exception as error:
            line = f"MLflow at {uri}: not searched ({type(error).__name__}: {short(error)})"
            traces.failed.append(masked(line))
    return traces


def _search(mlflow: Mlflow, traces: Traces, sought: Sought, remove: bool) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    marks, anchors = sought.marks, {*map(label, sought.anchors)}
    runs = mlflow.search("", deleted=True)
    flow_run_of = {run.info.run_id: run.data.tags.get("prefect_flow_run") for run in runs}
    for run in runs:
        tags, run_id = run.data.tags, run.info.run_id
        flow_run = flow_run_of.get(tags.get(PARENT_TAG, run_id))
        of_anchor = tags.get("kind") == "anchor"
        whole = of_anchor and tags.get("anchor") in anchors
        paths = list(_artifacts(mlflow, run_id))
        artifacts = {
            path
            for path in paths
            if whole
            or (flow_run in sought.flow_runs and not of_anchor and path.endswith(".parquet"))
            or (path.endswith(SEARCHED) and _holds(mlflow, run_id, path, marks))
        }
        if artifacts:
            artifacts |= {path for path in paths if path.endswith(NAMELESS)}
        written = {**tags, **run.data.params}
        names = [name for name, text in written.items() if _tells(name, text, marks)]
        if not (artifacts or names or whole):
            continue
        traces.runs += 1
        traces.flow_runs |= {flow_run} if flow_run else set()
        what = (*names, *(f"artifact {path}" for path in sorted(artifacts)))
        traces.lines += [f"MLflow run {run_id}: {one}" for one in what]
        if remove:
            files: Any = get_artifact_repository(run.info.artifact_uri, tracking_uri=mlflow.uri)
            for path in artifacts:
                files.delete_artifacts(path)
            for name in tags.keys() & set(names):
                mlflow.client.set_tag(run_id, name, "forgotten")
            if whole and run.info.lifecycle_stage == "active":
                mlflow.client.delete_run(run_id)


def _search_banks(mlflow: Mlflow, traces: Traces, sought: Sought, remove: bool) -> None:
    """Versions of the registered bank that name the user, or learned from the user."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    for version in registry.versions(mlflow):
        files: Any = get_artifact_repository(str(version.source), tracking_uri=mlflow.uri)
        if not _taught(files, sought):
            continue
        traces.runs += 1
        traces.lines.append(f"MLflow model {version.name}, version {version.version}")
        if remove:
            files.delete_artifacts("artifacts")
            mlflow.client.delete_model_version(version.name, version.version)
            mlflow.client.delete_logged_model(version.tags["model_id"])


def _taught(files: Any, sought: Sought) -> bool:
    """Whether a version's bank is of the user, too; one that cannot be read is."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(files.download_artifacts(registry.RUN_PATH, folder))
            run, named = Run.model_validate_json(file.read_bytes()), holds(file, sought.marks)
    except Exception:
        return True
    made_of = {
        one.folder
        for cell in run.cells
        for one in files_of(cell.base, cell.users.base, *(m.merged.bank for m in cell.mergings))
    }
    return named or bool(made_of & sought.learned)


def _artifacts(mlflow: Mlflow, run_id: str, folder: str | None = None) -> Iterator[str]:
    for item in mlflow.client.list_artifacts(run_id, folder):
        if item.is_dir:
            yield from _artifacts(mlflow, run_id, item.path)
        else:
            yield item.path


def _holds(mlflow: Mlflow, run_id: str, path: str, marks: Marks) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        return holds(Path(mlflow.client.download_artifacts(run_id, path, folder)), marks)


def _tells(name: str, text: str, marks: Marks) -> bool:
    """Whether a tag or parameter tells of the user. Seeds and counts look like ids, and do not."""
    if name in ("anchor", "failure", "mlflow.runName"):
        return marks.in_text(text)
    return any(part in text for part in marks.within)


def forget_in_prefect(
    flow_runs: Iterable[str], homes: Iterable[Path] = ()
) -> tuple[list[str], list[str]]:
    """Delete flow runs: (what was done, what is left), in lines.

    On the server that is set and in `homes`, where `mta run` may have its database. A run that none
    of them knows is left: it may be on another server.
    """
    wanted = {*flow_runs}
    unknown = set(wanted)
    places: list[str | Path] = [home for home in homes if (home / "prefect.db").exists()]
    if address := PREFECT_API_URL.value():
        places.insert(0, address)
    asked = []
    for place in places if wanted else []:
        try:
            with (
                local_server(place) if isinstance(place, Path) else nullcontext(),
                get_client(sync_client=True) as client,
            ):
                for run in sorted(unknown):
                    with suppress(ObjectNotFound):
                        client.delete_flow_run(UUID(run))
                        unknown.discard(run)
            asked.append(f"unknown to {masked(str(place))}")
        except Exception as error:
            asked.append(f"{masked(str(place))} not reached ({type(error).__name__})")
    removed = len(wanted) - len(unknown)
    done = f"Prefect: {removed} flow runs removed, with the names and logs of their tasks"
    why = "; ".join(asked) or "no server is set"
    return [done] if removed else [], [
        f"Prefect: `prefect flow-run delete {run}` where it ran, unless it is gone there ({why})"
        for run in sorted(unknown)
    ]

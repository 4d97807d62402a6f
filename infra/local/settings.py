"""What the local stack is made of: its folders, its environment, its `prefect.toml`.

Not run by itself; `python -m infra.local` is the program. Starts nothing, and writes only
`prefect.toml`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.store.files import FOLDER_URLS

HOST = "127.0.0.1"
WORK_POOL = "mta-local"
WORKER = "mta-local-worker"
GPU_LIMIT = "gpu"
DEPLOYMENT = "mta/full-benchmark"

WORKER_POLL_SECONDS = 2
WORKER_HEARTBEAT_SECONDS = 10
SLOT_WAIT_SECONDS = 5
WRITTEN_AT_ONCE = 200

TELEMETRY_OFF = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

# A user's own Prefect (another server, a cloud account, another database) must not leak into this
# one. Other PREFECT_ variables, such as the logging level, are theirs to set.
FOREIGN_PREFECT = (
    "PREFECT_API_",
    "PREFECT_CLOUD_",
    "PREFECT_HOME",
    "PREFECT_PROFILE",
    "PREFECT_SERVER_",
    "PREFECT__",
)


class StackError(Exception):
    """Something the user must know, in one line."""


@dataclass(frozen=True)
class Layout:
    """Where everything lies: all state is under `<root>/.mta`."""

    root: Path

    @property
    def state(self) -> Path:
        return self.root / ".mta"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def run(self) -> Path:
        return self.state / "run"

    @property
    def prefect_home(self) -> Path:
        return self.state / "prefect"

    @property
    def leases(self) -> Path:
        """Where the server's file lease storage keeps one file for each held slot."""
        return self.prefect_home / "concurrency_leases"

    @property
    def mlflow(self) -> Path:
        return self.state / "mlflow"

    @property
    def store(self) -> Path:
        return self.state / "store"

    @property
    def cache(self) -> Path:
        """Where a store at a URL keeps its pieces on this machine."""
        return self.state / "cache"

    @property
    def comparison(self) -> Path:
        """The table that the flow writes at its end."""
        return self.state / "last_comparison.txt"

    @property
    def plan(self) -> Path:
        """What the flow writes instead, with `dry_run`."""
        return self.state / "last_plan.md"

    @property
    def prefect_toml(self) -> Path:
        return self.root / "prefect.toml"

    def make(self) -> None:
        for folder in (self.logs, self.run, self.prefect_home, self.mlflow, self.store):
            folder.mkdir(parents=True, exist_ok=True)


def project_layout() -> Layout:
    """The layout of the project this file lies in."""
    return Layout(Path(__file__).resolve().parents[2])


def integer(environ: Mapping[str, str], name: str, default: int, *, least: int, most: int) -> int:
    """The whole number in variable `name`; unset or empty means `default`."""
    text = environ.get(name, "").strip()
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        raise StackError(f"{name} must be a whole number, got {text!r}") from None
    if not least <= value <= most:
        raise StackError(f"{name} must be between {least} and {most}, got {value}")
    return value


# Databases and artifact storage of the servers, where they are not the files below `.mta`.
PREFECT_DATABASE = "MTA_PREFECT_DATABASE"
MLFLOW_DATABASE = "MTA_MLFLOW_DATABASE"
MLFLOW_ARTIFACTS = "MTA_MLFLOW_ARTIFACTS"
# Where the servers read the addresses of their databases.
PREFECT_ADDRESS = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
MLFLOW_ADDRESS = "MLFLOW_BACKEND_STORE_URI"


def base_environment(layout: Layout, environ: Mapping[str, str]) -> dict[str, str]:
    """The user's environment, less what would lead Prefect elsewhere, plus what all parts share.

    Nor do databases' addresses, which hold passwords, belong in runs: only servers get theirs.
    """
    env = {k: v for k, v in environ.items() if not k.startswith(FOREIGN_PREFECT)}
    for name in (PREFECT_DATABASE, MLFLOW_DATABASE):
        env.pop(name, None)
    env.update(TELEMETRY_OFF)
    env["PREFECT_HOME"] = str(layout.prefect_home)
    env["MTA_ROOT"] = str(layout.root)
    env["PYTHONUNBUFFERED"] = "1"
    # So that what runs below finds `prefect` and `mlflow` without an activated environment.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    # A proxy is for the outside; httpx and requests would send 127.0.0.1 through it too.
    for name in ("NO_PROXY", "no_proxy"):
        env[name] = ",".join(filter(None, [env.get(name, ""), HOST, "localhost"]))
    return env


def prefect_environment(base: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the Prefect server: on its SQLite file, or on MTA_PREFECT_DATABASE."""
    address = environ.get(PREFECT_DATABASE, "").strip()
    # Not as an argument: those can be read by everybody on the machine.
    return {**base, **({PREFECT_ADDRESS: address} if address else {})}


def mlflow_environment(
    layout: Layout, base: Mapping[str, str], environ: Mapping[str, str]
) -> dict[str, str]:
    """The environment of the MLflow server: files, or MTA_MLFLOW_DATABASE and _ARTIFACTS."""
    database = environ.get(MLFLOW_DATABASE, "").strip()
    artifacts = environ.get(MLFLOW_ARTIFACTS, "").strip()
    env = {
        **base,
        MLFLOW_ADDRESS: database or f"sqlite:///{layout.mlflow / 'mlflow.db'}",
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts or str(layout.mlflow / "artifacts"),
        # Its job queue is for features that are not used here, and is several processes more.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    env.pop("MLFLOW_TRACKING_URI", None)
    return env


def client_environment(
    layout: Layout, environ: Mapping[str, str], *, prefect_port: int, mlflow_uri: str
) -> dict[str, str]:
    """The environment of the worker, and so of every flow run."""
    env = base_environment(layout, environ)
    env["PREFECT_API_URL"] = f"http://{HOST}:{prefect_port}/api"
    env["MLFLOW_TRACKING_URI"] = mlflow_uri
    # A URL may be the user's choice; a folder elsewhere would part it, or its cache, from reports
    # and spool, which lie beside it.
    given = env.get("MTA_STORE", "") or str(layout.store)
    at_url = "://" in given and not given.startswith(FOLDER_URLS)
    if not at_url and Path(given).absolute() != layout.store.absolute():
        raise StackError(
            f"MTA_STORE {given} is a folder, and the store of this stack is {layout.store}: unset "
            "it, or run `python -m flows.mta` with it"
        )
    cache = env.get("MTA_STORE_CACHE", "") or str(layout.cache)
    if at_url and Path(cache).absolute() != layout.cache.absolute():
        raise StackError(
            f"MTA_STORE_CACHE {cache}: the cache of this stack is {layout.cache}: unset it, or run "
            "`python -m flows.mta` with it"
        )
    env["MTA_STORE"] = given if at_url else str(layout.store)
    env["MTA_STORE_CACHE"] = str(layout.cache)
    env["TOKENIZERS_PARALLELISM"] = "false"
    return env


def prefect_toml(layout: Layout, prefect_port: int | None) -> str:
    """The text of `prefect.toml`, which Prefect reads from the folder it is called in.

    Without a port (the stack is down) there is no API address, and Prefect may not serve itself
    from the same database either: a run put there would wait, unseen, for the next start.
    """

    def quoted(value: object) -> str:
        return json.dumps(str(value), ensure_ascii=False)  # JSON strings are TOML strings

    lines = [
        "# Written by `python -m infra.local`; changes here are lost.",
        f"home = {quoted(layout.prefect_home)}",
        f"profiles_path = {quoted(layout.prefect_home / 'profiles.toml')}",
        "",
    ]
    if prefect_port is not None:
        lines += ["[api]", f"url = {quoted(f'http://{HOST}:{prefect_port}/api')}", ""]
    else:
        lines += ["[server.ephemeral]", "enabled = false", ""]
    lines += [
        "[server]",
        "analytics_enabled = false",
        "",
        "[server.concurrency]",
        "# On disk, so that slots held by a run are still known after the server has restarted.",
        'lease_storage = "prefect.server.concurrency.lease_storage.filesystem"',
        f"maximum_concurrency_slot_wait_seconds = {SLOT_WAIT_SECONDS}",
        "",
        "[server.deployments]",
        f"concurrency_slot_wait_seconds = {SLOT_WAIT_SECONDS}",
        "",
        "# States of task runs and events are written down a second's at a time, not one by one or",
        "# by twenties: SQLite takes one writer, and clients that it turns away wait two seconds.",
        "[server.services.task_run_recorder]",
        f"batch_size = {WRITTEN_AT_ONCE}",
        "flush_interval = 1",
        "",
        "[server.services.event_persister]",
        f"batch_size = {WRITTEN_AT_ONCE}",
        "flush_interval = 1",
        "",
        "[worker]",
        f"query_seconds = {WORKER_POLL_SECONDS}",
        f"heartbeat_seconds = {WORKER_HEARTBEAT_SECONDS}",
        "",
    ]
    return "\n".join(lines)


def write_prefect_toml(layout: Layout, prefect_port: int | None) -> None:
    text = prefect_toml(layout, prefect_port)
    path = layout.prefect_toml
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    new = path.with_name("prefect.toml.new")  # renamed, so that no reader sees half a file
    new.write_text(text, encoding="utf-8")
    new.replace(path)

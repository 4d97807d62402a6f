"""What the local stack is made of: its folders, its environment, its `prefect.toml`."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from string import Template

from tasks.errors import InputError
from tasks.files import write_atomic
from tasks.results.store import FOLDER_URLS

HOST = "127.0.0.1"
# The processes of the stack; their files and logs have the same names.
SERVER = "prefect-server"
MLFLOW = "mlflow"
WORKER = "worker"
WORK_POOL = "mta-local"
GPU_LIMIT = "gpu"
DEPLOYMENT = "mta/full-benchmark"
# All that prefect.yaml has.
DEPLOYMENTS = (DEPLOYMENT, "mta/personalise")

# Variables with the servers' databases, instead of files below `.mta`.
PREFECT_DATABASE = "MTA_PREFECT_DATABASE"
MLFLOW_DATABASE = "MTA_MLFLOW_DATABASE"

TELEMETRY_OFF = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# A user's own Prefect (another server, a cloud account, another database) must not leak into this
# one. Other PREFECT_ variables, such as the logging level, are theirs to set.
FOREIGN_PREFECT = tuple(
    f"PREFECT_{name}" for name in ("API_", "CLOUD_", "HOME", "PROFILE", "SERVER_", "_")
)


class StackError(InputError):
    """Something about the stack that the user must know, in one line."""


class Layout:
    """The paths of the stack: all state is below `<root>/.mta`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.prefect_toml = root / "prefect.toml"
        self.state = root / ".mta"
        self.logs = self.state / "logs"
        self.run = self.state / "run"
        self.prefect_home = self.state / "prefect"
        self.mlflow = self.state / "mlflow"
        self.store = self.state / "store"
        self.cache = self.state / "cache"  # of a store at a URL
        # What the flow writes at its end, and with `dry_run`.
        self.comparison = self.state / "last_comparison.txt"
        self.plan = self.state / "last_plan.md"
        self.report = self.state / "report.html"

    def make(self) -> None:
        for folder in (self.logs, self.run, self.prefect_home, self.mlflow, self.store):
            folder.mkdir(parents=True, exist_ok=True)


# The paths of the project that this file is in.
PROJECT = Layout(Path(__file__).resolve().parents[2])


def base_environment(layout: Layout, environ: Mapping[str, str]) -> dict[str, str]:
    """The user's environment without another Prefect's settings, with what all processes share.

    Addresses of databases hold passwords: each server gets its own, and no run gets any.
    """
    dropped = (*FOREIGN_PREFECT, PREFECT_DATABASE, MLFLOW_DATABASE)
    env = {k: v for k, v in environ.items() if not k.startswith(dropped)}
    env |= TELEMETRY_OFF | {"PREFECT_HOME": str(layout.prefect_home), "MTA_ROOT": str(layout.root)}
    env["PYTHONUNBUFFERED"] = "1"
    # What runs below finds `prefect` and `mlflow` without an activated environment.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    # A proxy is for the outside; httpx and requests would send 127.0.0.1 through it too.
    for name in ("NO_PROXY", "no_proxy"):
        env[name] = ",".join(filter(None, [env.get(name, ""), HOST, "localhost"]))
    return env


def prefect_environment(layout: Layout, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the Prefect server: on its SQLite file, or on MTA_PREFECT_DATABASE."""
    env = base_environment(layout, environ)
    if database := environ.get(PREFECT_DATABASE, "").strip():
        # Not as an argument: everybody on the machine can read those.
        env["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    return env


def mlflow_environment(layout: Layout, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the MLflow server: files, or MTA_MLFLOW_DATABASE and _ARTIFACTS."""
    database = environ.get(MLFLOW_DATABASE, "").strip()
    artifacts = environ.get("MTA_MLFLOW_ARTIFACTS", "").strip()
    env = base_environment(layout, environ)
    env.pop("MLFLOW_TRACKING_URI", None)
    return env | {
        "MLFLOW_BACKEND_STORE_URI": database or f"sqlite:///{layout.mlflow / 'mlflow.db'}",
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts or str(layout.mlflow / "artifacts"),
        # Its job queue is for features that are not used here, and is several processes more.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def client_environment(
    layout: Layout, environ: Mapping[str, str], *, prefect_port: int, mlflow_uri: str
) -> dict[str, str]:
    """The environment of the worker, and so of every flow run.

    Raises StackError if the store, or the cache of one at a URL, is a folder elsewhere: reports,
    runs and logs would not lie beside it.
    """
    store = environ.get("MTA_STORE", "")
    at_url = "://" in store and not store.startswith(FOLDER_URLS)
    name, folder = ("MTA_STORE_CACHE", layout.cache) if at_url else ("MTA_STORE", layout.store)
    value = environ.get(name, "")
    if value and Path(value).absolute() != folder.absolute():
        raise StackError(
            f"{name} {value}: it is {folder} for this stack: unset it, or run "
            "`python -m flows.mta` with it"
        )
    return base_environment(layout, environ) | {
        "PREFECT_API_URL": f"http://{HOST}:{prefect_port}/api",
        "MLFLOW_TRACKING_URI": mlflow_uri,
        "MTA_STORE": store if at_url else str(layout.store),
        "MTA_STORE_CACHE": str(layout.cache),
        "TOKENIZERS_PARALLELISM": "false",
    }


def write_prefect_toml(layout: Layout, port: int | None) -> None:
    """Write the prefect.toml of the project's folder. port: of the server; None: it is down."""
    template = Path(__file__).with_name("prefect.template.toml").read_text(encoding="utf-8")
    up, down = f'[api]\nurl = "http://{HOST}:{port}/api"', "[server.ephemeral]\nenabled = false"
    # What JSON escapes, TOML does.
    home = json.dumps(str(layout.prefect_home), ensure_ascii=False)[1:-1]
    text = Template(template).substitute(home=home, address=up if port else down)
    write_atomic(layout.prefect_toml, text.encode())

"""The stack as a whole: bring it up, tell how it is, take it down.

Not run by itself; `python -m infra.local` is the program. `up` may be called at any time: it keeps
what is well, replaces what has died, and makes sure of what the server must know.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from datetime import datetime
from functools import partial

from infra.command import say
from infra.local import processes, settings
from infra.local.processes import Record, wait_until
from infra.local.server import (
    PrefectApi,
    answers,
    end_worker,
    ensure_deployment,
    ensure_pool_and_limit,
)
from infra.local.settings import HOST, MLFLOW, SERVER, WORK_POOL, WORKER, Layout, StackError

PARTS = (SERVER, MLFLOW, WORKER)
# What the worker calls itself at the server.
WORKER_NAME = "mta-local-worker"
START_SECONDS = 180.0
RECENT_SECONDS = 30.0  # three of the worker's heartbeats


def up(
    layout: Layout, prefect_port: int, mlflow_port: int, slots: int, *, deploy: bool = False
) -> dict[str, str]:
    """Make sure that all of it runs; the environment of the worker, which leads to both servers.

    slots: of the `gpu` limit; 0 leaves it as it is. deploy: even if nothing has changed.
    """
    layout.make()
    with processes.one_at_a_time(layout):
        # Both servers start at the same time: each takes seconds.
        servers = [_server(layout, SERVER, prefect_port)]
        port = servers[0].port
        mlflow = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
        if not mlflow:
            servers.append(_server(layout, MLFLOW, mlflow_port, taken=port))
        for record in servers:
            wait_until(record, partial(_healthy, record), START_SECONDS)
        uri = mlflow or f"http://{HOST}:{servers[1].port}"
        settings.write_prefect_toml(layout, port)
        env = settings.client_environment(layout, os.environ, prefect_port=port, mlflow_uri=uri)
        api = PrefectApi(env["PREFECT_API_URL"])
        ensure_pool_and_limit(api, slots)
        worker = _worker(layout, api, env)
        # A new worker comes up while the deployment is made.
        ensure_deployment(layout, api, env, always=deploy)
        wait_until(worker, lambda: _reports(api, worker), START_SECONDS)
    say(f"Prefect  http://{HOST}:{port}")
    say(f"MLflow   {uri}" + (" (MLFLOW_TRACKING_URI)" if mlflow else ""))
    return env


def _healthy(record: Record) -> bool:
    """Whether a server answers; true of what is no server."""
    path = "/api/health" if record.name == SERVER else "/health"
    return not record.port or answers(f"http://{HOST}:{record.port}{path}")


def _server(layout: Layout, name: str, port: int, taken: int = 0) -> Record:
    """The running server of that name, or a new one that may not answer yet."""
    old = Record.load(layout, name)
    if old is not None and old.process() is not None:
        return old
    if old is not None:
        say(f"{name} has died: starting it again")
    processes.end(processes.part(layout, name))
    chosen = processes.free_port(port, taken)
    if chosen != port:
        say(f"port {port} is taken, {name} gets {chosen}")
    python = [sys.executable, "-m"]
    if name == SERVER:
        argv = [*python, "prefect", "server", "start"]
        env = settings.prefect_environment(layout, os.environ)
        settings.write_prefect_toml(layout, chosen)  # before the start: the server reads it once
        given, file = settings.PREFECT_DATABASE, layout.prefect_home / "prefect.db"
    else:
        argv = [*python, "mlflow", "server", "--workers", "1", "--serve-artifacts"]
        env = settings.mlflow_environment(layout, os.environ)
        given, file = settings.MLFLOW_DATABASE, layout.mlflow / "mlflow.db"
    if not os.environ.get(given, "").strip():
        # First of all the file is made whole: both at the same time, each takes seconds.
        argv = [*python, "tasks.databases", name, str(file), *argv]
    say(f"starting {name} on port {chosen}")
    argv += ["--host", HOST, "--port", str(chosen)]
    log = layout.logs / f"{name}.log"
    record = processes.start(name, argv, env=env, cwd=layout.root, log=log, port=chosen)
    record.save(layout)
    return record


def _reports(api: PrefectApi, worker: Record) -> bool:
    """Whether the worker has reported to the server lately."""
    since = max(worker.create_time, time.time() - RECENT_SECONDS)
    known = api.call("POST", f"/work_pools/{WORK_POOL}/workers/filter", {}) or []
    beats = [one["last_heartbeat_time"] for one in known if one["name"] == WORKER_NAME]
    return any(beat and datetime.fromisoformat(beat).timestamp() >= since for beat in beats)


def _worker(layout: Layout, api: PrefectApi, env: dict[str, str]) -> Record:
    """The running worker, or a new one that may not have reported yet."""
    old = Record.load(layout, WORKER)
    if old is not None and old.process() is not None:
        if old.environment == processes.fingerprint(env):
            return old
        if processes.jobs(layout):
            say("the environment has changed, but a run is under way: the worker keeps the old one")
            return old
        say("the environment has changed: starting the worker again")
    elif old is not None:
        say("the worker has died: starting another")
    end_worker(layout, api, "The worker ended while this run was under way.")
    say("starting the worker")
    argv = [sys.executable, "-m", "prefect", "worker", "start", "--pool", WORK_POOL]
    argv += ["--type", "process", "--name", WORKER_NAME, "--install-policy", "never"]
    log = layout.logs / f"{WORKER}.log"
    record = processes.start(WORKER, argv, env=env, cwd=layout.root, log=log)
    record.save(layout)
    return record


def down(layout: Layout) -> None:
    """End what was started, the worker first; runs under way are set to CRASHED."""
    with processes.one_at_a_time(layout):
        server = Record.load(layout, SERVER)
        if server and server.process():
            say("ending the worker")
            try:
                api = PrefectApi(f"http://{HOST}:{server.port}/api")
                end_worker(layout, api, "The local stack was stopped.")
            except StackError as error:
                say(f"{error}; the next start will look after it")
        for name in (WORKER, MLFLOW, SERVER):
            if left := processes.part(layout, name):
                say(f"ending {name}")
                processes.end(left)
            (layout.run / f"{name}.json").unlink(missing_ok=True)
        if layout.prefect_toml.exists():
            settings.write_prefect_toml(layout, None)
        say("stopped")


def status(layout: Layout) -> bool:
    """Print a line for each part: its name, how it is, its pid and address; whether all is well."""
    well = True
    for name in PARTS:
        record = Record.load(layout, name)
        state, pid, url = "not started", "", ""
        if record is not None:
            alive, pid = record.process() is not None, str(record.pid)
            state = "died" if not alive else "running" if _healthy(record) else "does not answer"
            url = f"http://{HOST}:{record.port}" if record.port else ""
        well = well and state == "running"
        print(f"{name:15} {state:16} {pid:>8} {url}")
    return well


def clean(layout: Layout) -> None:
    """Remove all state. Raises StackError where something still uses it."""
    for name in PARTS:
        if processes.part(layout, name):
            raise StackError(f"{name} still runs: first `make stop`")
    shutil.rmtree(layout.state, ignore_errors=True)
    if layout.state.exists():
        raise StackError(f"{layout.state} could not be removed whole")
    layout.prefect_toml.unlink(missing_ok=True)

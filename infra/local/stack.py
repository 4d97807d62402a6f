"""The stack as a whole: bring it up, tell how it is, take it down.

Not run by itself; `python -m infra.local` is the program. `up` may be called at any time: it keeps
what is well, replaces what has died, and makes sure of what the server must know.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from infra.local.api import PrefectApi, answers
from infra.local.processes import (
    Record,
    end,
    end_all,
    fingerprint,
    free_port,
    one_at_a_time,
    session_leftovers,
    start,
    wait_until,
)
from infra.local.register import ensure_deployment, ensure_gpu_limit, ensure_work_pool
from infra.local.settings import (
    HOST,
    MLFLOW_ADDRESS,
    PREFECT_ADDRESS,
    WORK_POOL,
    WORKER,
    WORKER_HEARTBEAT_SECONDS,
    Layout,
    StackError,
    base_environment,
    client_environment,
    integer,
    mlflow_environment,
    prefect_environment,
    write_prefect_toml,
)
from infra.local.sweep import end_jobs, job_processes, sweep

SERVER = "prefect-server"
MLFLOW = "mlflow"
WORKER_PROCESS = "worker"
NAMES = (WORKER_PROCESS, MLFLOW, SERVER)  # in the order in which they are ended

SERVER_TIMEOUT = 180.0
UNHEALTHY_AFTER = 20.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Running:
    """A stack that is up."""

    api: PrefectApi
    mlflow_uri: str
    env: dict[str, str]


def health_url(name: str, port: int) -> str:
    return f"http://{HOST}:{port}" + ("/api/health" if name == SERVER else "/health")


def up(layout: Layout, environ: Mapping[str, str], say: Say, *, deploy: bool = False) -> Running:
    """Make sure that all of it runs. `deploy`: deploy even if nothing has changed."""
    with one_at_a_time(layout.run, say):
        return _up(layout, environ, say, deploy=deploy)


def _up(layout: Layout, environ: Mapping[str, str], say: Say, *, deploy: bool) -> Running:
    prefect_port = integer(environ, "PREFECT_PORT", 4200, least=1, most=65535)
    mlflow_port = integer(environ, "MLFLOW_PORT", 5000, least=1, most=65535)
    slots = integer(environ, "GPU_SLOTS", 0, least=0, most=1024) or None
    layout.make()
    env = base_environment(layout, environ)
    foreign_mlflow = environ.get("MLFLOW_TRACKING_URI", "").strip()

    # Both servers start at the same time: each takes seconds.
    own = prefect_environment(env, environ)
    server = _server(layout, SERVER, prefect_port, own, say, taken=())
    mlflow = None
    if not foreign_mlflow:
        own = mlflow_environment(layout, env, environ)
        mlflow = _server(layout, MLFLOW, mlflow_port, own, say, taken=(server.port,))
    for record in filter(None, (server, mlflow)):
        _wait_for_server(layout, record, say)

    mlflow_uri = foreign_mlflow or f"http://{HOST}:{mlflow.port if mlflow else mlflow_port}"
    write_prefect_toml(layout, server.port)
    api = PrefectApi(f"http://{HOST}:{server.port}/api")
    env = client_environment(layout, environ, prefect_port=server.port, mlflow_uri=mlflow_uri)
    ensure_work_pool(api)
    ensure_gpu_limit(api, slots)
    worker, since = _worker(layout, api, env, say)
    if ensure_deployment(layout, api, env, always=deploy):
        say("deployed")
    if since is not None:  # the worker has come up while the deployment was made
        wait_until(
            "the worker",
            lambda: (_heartbeat(api) or 0) >= since,
            record=worker,
            log=layout.logs / f"{WORKER_PROCESS}.log",
            timeout=120,
            say=say,
        )
    say(f"Prefect  http://{HOST}:{server.port}")
    say(f"MLflow   {mlflow_uri}" + (" (MLFLOW_TRACKING_URI)" if foreign_mlflow else ""))
    return Running(api, mlflow_uri, env)


def _server(
    layout: Layout, name: str, port: int, env: dict[str, str], say: Say, *, taken: tuple[int, ...]
) -> Record:
    """The running server of that name, or a new one that may not answer yet."""
    old = Record.load(layout.run, name)
    if old is not None:
        if old.process() is not None and _recovers(name, old.port, say):
            return old
        say(f"{name} has died or does not answer: starting it again")
        end(old)
    chosen = free_port(port, taken)
    if chosen != port:
        say(f"port {port} is taken, {name} gets {chosen}")
    module = [sys.executable, "-m"]
    if name == SERVER:
        argv = [*module, "infra.local.prefect_server", "server", "start"]
        argv += ["--host", HOST, "--port", str(chosen)]
        database = layout.prefect_home / "prefect.db"
        ours = PREFECT_ADDRESS not in env
        write_prefect_toml(layout, chosen)  # before the start: the server reads it once
    else:
        argv = [*module, "mlflow", "server", "--host", HOST, "--port", str(chosen)]
        argv += ["--workers", "1", "--serve-artifacts"]
        database = layout.mlflow / "mlflow.db"
        ours = env[MLFLOW_ADDRESS] == f"sqlite:///{database}"
    if ours:  # first of all the file is made whole: both at the same time, each takes seconds
        argv = [*module, "tasks.store.databases", name, str(database), *argv]
    say(f"starting {name} on port {chosen}")
    log = layout.logs / f"{name}.log"
    record = start(name, argv, env=env, cwd=layout.root, log=log, port=chosen)
    record.save(layout.run)
    return record


def _recovers(name: str, port: int, say: Say) -> bool:
    """Whether a server that is there answers, if need be after a while: it may be busy."""
    limit = time.monotonic() + UNHEALTHY_AFTER
    while not answers(health_url(name, port)):
        if time.monotonic() > limit:
            return False
        say(f"waiting for {name} to answer")
        time.sleep(2)
    return True


def _wait_for_server(layout: Layout, record: Record, say: Say) -> None:
    wait_until(
        record.name,
        lambda: answers(health_url(record.name, record.port)),
        record=record,
        log=layout.logs / f"{record.name}.log",
        timeout=SERVER_TIMEOUT,
        say=say,
    )


def _heartbeat(api: PrefectApi) -> float | None:
    """When the worker last reported to the server, in seconds since 1970."""
    workers = api.call("POST", f"/work_pools/{WORK_POOL}/workers/filter", {}) or []
    for worker in workers:
        if worker["name"] == WORKER and worker["last_heartbeat_time"]:
            return datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp()
    return None


def _worker(
    layout: Layout, api: PrefectApi, env: dict[str, str], say: Say
) -> tuple[Record, float | None]:
    """The worker, and for a new one the time from which on its first report counts."""
    old = Record.load(layout.run, WORKER_PROCESS)
    reason = "The worker ended while this run was under way."
    if old is not None and old.process() is not None:
        if not _reports(api, say):
            say("the worker does not report: starting another")
            reason = "The worker did not report any more."
        elif old.environment == fingerprint(env):
            return old, None
        elif job_processes(layout):
            say("the environment has changed, but a run is under way: the worker keeps the old one")
            return old, None
        else:
            say("the environment has changed: starting the worker again")
    elif old is not None:
        say("the worker has died: starting another")
    if old is not None:
        end(old)
    sweep(layout, api, say, reason=reason)
    argv = [sys.executable, "-m", "prefect", "worker", "start"]
    argv += ["--pool", WORK_POOL, "--type", "process", "--name", WORKER]
    argv += ["--install-policy", "never"]
    since = time.time()
    log = layout.logs / f"{WORKER_PROCESS}.log"
    say("starting the worker")
    record = start(WORKER_PROCESS, argv, env=env, cwd=layout.root, log=log)
    record.save(layout.run)
    return record, since


def _reports(api: PrefectApi, say: Say) -> bool:
    """Whether the worker has reported lately, or does so within three of its intervals."""
    recent = 3 * WORKER_HEARTBEAT_SECONDS
    limit = time.monotonic() + recent
    while time.time() - (_heartbeat(api) or 0) > recent:
        if time.monotonic() > limit:
            return False
        say("waiting for the worker to report")
        time.sleep(3)
    return True


def down(layout: Layout, say: Say) -> None:
    """End what was started, the worker first; runs under way are set to CRASHED."""
    if not layout.run.is_dir():
        say("nothing runs")
        return
    with one_at_a_time(layout.run, say):
        ended = 0
        for name in NAMES:
            record = Record.load(layout.run, name)
            if record is None:
                continue
            if record.process() is not None:
                say(f"ending {name} (pid {record.pid})")
                end(record)
                ended += 1
            else:
                end_all(session_leftovers(record))
            record.forget(layout.run)
            if name == WORKER_PROCESS:
                _after_worker(layout, say)
        end_jobs(layout)
        if layout.prefect_toml.exists():
            write_prefect_toml(layout, None)
        say("stopped" if ended else "nothing ran")


def _after_worker(layout: Layout, say: Say) -> None:
    server = Record.load(layout.run, SERVER)
    if server is None or server.process() is None:
        return
    api = PrefectApi(f"http://{HOST}:{server.port}/api")
    try:
        sweep(layout, api, say, reason="The local stack was stopped.")
    except StackError as error:
        say(f"{error}; the next start will look after it")


def status(layout: Layout) -> list[dict[str, Any]]:
    """One row for each part: name, pid, whether it is well, and where it is."""
    rows: list[dict[str, Any]] = []
    for name in reversed(NAMES):
        record = Record.load(layout.run, name)
        if record is None:
            rows.append({"name": name, "state": "not started", "pid": None, "url": ""})
            continue
        alive = record.process() is not None
        well = alive and (not record.port or answers(health_url(name, record.port)))
        state = "running" if well else "does not answer" if alive else "died"
        url = f"http://{HOST}:{record.port}" if record.port else ""
        rows.append({"name": name, "state": state, "pid": record.pid, "url": url})
    return rows


def clean(layout: Layout) -> None:
    """Remove all state, unless something still uses it."""
    for name in NAMES:
        record = Record.load(layout.run, name)
        if record is not None and (record.process() or session_leftovers(record)):
            raise StackError(f"{name} still runs (pid {record.pid}): first `make stop`")
    shutil.rmtree(layout.state, ignore_errors=True)
    if layout.state.exists():
        raise StackError(f"{layout.state} could not be removed whole")
    layout.prefect_toml.unlink(missing_ok=True)

"""The stack as a whole: bring up what does not run, show its state, take it down."""

import contextlib
import os
import shutil
import sys
from datetime import datetime
from functools import partial

import psutil

from infra.command import say
from infra.local import processes, server, settings
from infra.local.processes import Service, wait_until
from infra.local.server import PrefectApi
from infra.local.settings import HOST, MLFLOW, PROJECT, SERVER, WORK_POOL, WORKER, StackError

# What the worker calls itself at the server.
WORKER_NAME = "mta-local-worker"
WORKER_COMMAND = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process"]
WORKER_COMMAND += ["--pool", WORK_POOL]


def up(prefect_port: int, mlflow_port: int, slots: int, *, deploy: bool = False) -> dict[str, str]:
    """Start what does not run; returns the worker's environment, with both servers' addresses.

    slots: of the `gpu` limit; 0 leaves it as it is. deploy: even if nothing has changed.
    """
    PROJECT.make()
    with processes.one_at_a_time(PROJECT):
        # Both servers start at the same time: each takes seconds.
        servers = [_server(SERVER, prefect_port)]
        port = servers[0].port
        uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
        if not uri:
            # Prefect may not have taken its port yet.
            servers.append(_server(MLFLOW, mlflow_port if mlflow_port != port else port + 1))
            uri = f"http://{HOST}:{servers[1].port}"
        for service in servers:
            wait_until(service, partial(_healthy, service))
        settings.write_prefect_toml(PROJECT, port)
        env = settings.client_environment(PROJECT, os.environ, prefect_port=port, mlflow_uri=uri)
        api = PrefectApi(env["PREFECT_API_URL"])
        server.ensure_pool_and_limit(api, slots)
        worker = _worker(api, env)
        # A new worker comes up while the deployment is made.
        server.ensure_deployment(PROJECT, api, env, always=deploy)
        wait_until(worker, partial(_reports, api, worker))
    say(f"Prefect  http://{HOST}:{port}")
    say(f"MLflow   {uri}")
    return env


def _healthy(service: Service) -> bool:
    """Whether a server answers; True for the worker, which is none."""
    path = "/api/health" if service.name == SERVER else "/health"
    return not service.port or server.answers(f"http://{HOST}:{service.port}{path}")


def _server(name: str, port: int) -> Service:
    """The running server of that name, or a new one that may not answer yet."""
    if old := Service.load(PROJECT, name):
        if old.process() is not None:
            return old
        say(f"{name} has died: starting it again")
    processes.end(processes.part(PROJECT, name))
    chosen = processes.free_port(port)
    if chosen != port:
        say(f"port {port} is taken, {name} gets {chosen}")
    python = [sys.executable, "-m"]
    if name == SERVER:
        argv = [*python, "prefect", "server", "start"]
        env = settings.prefect_environment(PROJECT, os.environ)
        settings.write_prefect_toml(PROJECT, chosen)  # before the start: the server reads it once
        variable, file = settings.PREFECT_DATABASE, PROJECT.prefect_home / "prefect.db"
    else:
        argv = [*python, "mlflow", "server", "--workers", "1", "--serve-artifacts"]
        env = settings.mlflow_environment(PROJECT, os.environ)
        variable, file = settings.MLFLOW_DATABASE, PROJECT.mlflow / "mlflow.db"
    if not os.environ.get(variable, "").strip():
        # The process first makes the database. Both do so at the same time: each takes seconds.
        argv = [*python, "tasks.databases", name, str(file), *argv]
    return _started(name, [*argv, "--host", HOST, "--port", str(chosen)], env, chosen)


def _worker(api: PrefectApi, env: dict[str, str]) -> Service:
    """The running worker, or a new one that may not have reported yet."""
    old = Service.load(PROJECT, WORKER)
    if old and (process := old.process()):
        with contextlib.suppress(psutil.Error):  # it may end just now
            if processes.telling(process.environ()) == processes.telling(env):
                return old
        if processes.jobs(PROJECT):
            say("the environment has changed, but a run is under way: the worker keeps the old one")
            return old
        say("the environment has changed: starting the worker again")
    elif old:
        say("the worker has died: starting another")
    server.end_worker(PROJECT, api, "The worker ended while this run was under way.")
    argv = [*WORKER_COMMAND, "--name", WORKER_NAME, "--install-policy", "never"]
    return _started(WORKER, argv, env)


def become_worker(api_url: str, slots: int) -> None:
    """Make work pool, `gpu` limit and deployment if needed, then become the worker."""
    PROJECT.make()
    api = PrefectApi(api_url)
    server.ensure_pool_and_limit(api, slots)
    server.ensure_deployment(PROJECT, api, {**os.environ, "MTA_ROOT": str(PROJECT.root)})
    os.execv(sys.executable, WORKER_COMMAND)  # signals are the worker's own


def _started(name: str, argv: list[str], env: dict[str, str], port: int = 0) -> Service:
    say(f"starting {name}" + (f" on port {port}" if port else ""))
    log = PROJECT.logs / f"{name}.log"
    service = processes.start(name, argv, env=env, cwd=PROJECT.root, log=log, port=port)
    service.save(PROJECT)
    return service


def _reports(api: PrefectApi, worker: Service) -> bool:
    """Whether the worker has reported to the server since its start."""
    known = api.call("POST", f"/work_pools/{WORK_POOL}/workers/filter", {}) or []
    beats = [one["last_heartbeat_time"] for one in known if one["name"] == WORKER_NAME]
    times = [datetime.fromisoformat(beat).timestamp() for beat in beats if beat]
    return any(time >= worker.create_time for time in times)


def down() -> None:
    """End what was started, the worker first; runs under way are set to CRASHED."""
    with processes.one_at_a_time(PROJECT):
        service = Service.load(PROJECT, SERVER)
        if service and service.process():
            say("ending the worker")
            try:
                api = PrefectApi(f"http://{HOST}:{service.port}/api")
                server.end_worker(PROJECT, api, "The local stack was stopped.")
            except StackError as error:
                say(f"{error}; the next start will look after it")
        for name in (WORKER, MLFLOW, SERVER):
            if left := processes.part(PROJECT, name):
                say(f"ending {name}")
                processes.end(left)
            (PROJECT.run / f"{name}.json").unlink(missing_ok=True)
        if PROJECT.prefect_toml.exists():
            settings.write_prefect_toml(PROJECT, None)
        say("stopped")


def status() -> int:
    """Print what runs, and where; exit code 3 unless all of it is well."""
    well = True
    for name in (SERVER, MLFLOW, WORKER):
        state, pid, url = "not started", "", ""
        if service := Service.load(PROJECT, name):
            alive, pid = service.process() is not None, str(service.pid)
            state = "died" if not alive else "running" if _healthy(service) else "does not answer"
            url = f"http://{HOST}:{service.port}" if service.port else ""
        well = well and state == "running"
        print(f"{name:15} {state:16} {pid:>8} {url}")
    return 0 if well else 3


def clean() -> None:
    """Remove .mta; refused while the stack runs."""
    for name in (SERVER, MLFLOW, WORKER):
        if processes.part(PROJECT, name):
            raise StackError(f"{name} still runs: first `make stop`")
    shutil.rmtree(PROJECT.state, ignore_errors=True)
    if PROJECT.state.exists():
        raise StackError(f"{PROJECT.state} could not be removed whole")
    PROJECT.prefect_toml.unlink(missing_ok=True)

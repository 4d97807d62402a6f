"""`mta run`: the flow in this process, with a Prefect server of its own, and MLflow in a file.

The next run clears up after a killed one. A run whose server is killed ends.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from infra.command import say
from infra.local.processes import Service, end, family, free_port, start, wait_until
from infra.local.server import UNDER_WAY, PrefectApi, answers, crash, free_slots
from infra.local.settings import HOST, PROJECT, SERVER, base_environment
from tasks.errors import InputError

# The variable with the pid of the run that a process belongs to: its server, its workers.
OWNER = "MTA_LOCAL_OWNER"
LEASES_ON_DISK = "prefect.server.concurrency.lease_storage.filesystem"


def run_alone(pairs: list[str]) -> int:
    """Run the flow with `name=value` pairs; the exit code is 0 only when nothing is missing."""
    values = parameters(pairs)

    def check() -> None:
        from tasks.config.run import resolve

        resolve(values)

    with local_server(Path(".mta/local").absolute(), check):
        from flows.mta import mta

        state = mta(**values, return_state=True)
    if not state.is_completed():
        say(f"{state.name}: {state.message}")
        return 1
    return 0


def parameters(pairs: list[str]) -> dict[str, Any]:
    """`name=value` pairs; a value that is JSON is read as JSON, any other is text."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise InputError(f"-p {pair}: write it as name=value")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


@contextlib.contextmanager
def local_server(home: Path, meanwhile: Callable[[], None] | None = None) -> Iterator[None]:
    """Run the body against a server of its own, its database in `home`, which all such runs share.

    meanwhile: called while the server starts. Nothing before it may import Prefect: without an
    address, Prefect's threads, here and in workers, would start another server.

    The project's own server may be running, and two servers on one SQLite file disturb each other.
    """
    home.mkdir(parents=True, exist_ok=True)
    no_other = end_orphans(home)
    before = dict(os.environ)
    mine = {"PREFECT_HOME": str(home), OWNER: str(os.getpid())}
    over = threading.Event()
    try:
        server = _start(home, mine)
        # At exit, so that Prefect can send the rest: without a server it tries for a minute.
        atexit.register(lambda: end(family(**mine)))
        api = PrefectApi(f"http://{HOST}:{server.port}/api")
        os.environ.update(mine, PREFECT_API_URL=api.url)
        if meanwhile:
            meanwhile()
        wait_until(server, lambda: answers(f"{api.url}/health"))
        if no_other:
            # Runs under way there were killed. The server has just started and knows no leases, so
            # their slots would never be freed.
            crash(api, api.rows("flow_runs", flow_runs=UNDER_WAY), "It was killed.")
            free_slots(api, home)
        threading.Thread(target=_watch, args=(server, over), daemon=True).start()
        from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

        with temporary_settings({PREFECT_API_URL: api.url, PREFECT_HOME: home}):
            yield
    finally:
        over.set()
        os.environ.clear()
        os.environ.update(before)


def end_orphans(home: Path) -> bool:
    """End servers on `home` and workers whose run was killed. Returns whether no run is left."""
    there = [one for one in family(PREFECT_HOME=str(home)) if OWNER in one.info["environ"]]
    orphans = [one for one in there if not _has_owner(one)]
    end(orphans)
    return len(orphans) == len(there)


def _has_owner(process: psutil.Process) -> bool:
    """Whether the run that a process belongs to lives. A later process may have its pid."""
    with contextlib.suppress(psutil.NoSuchProcess):
        owner = psutil.Process(int(process.info["environ"][OWNER]))
        older: bool = owner.create_time() <= process.create_time()
        return older and bool(owner.status() != psutil.STATUS_ZOMBIE)
    return False


def _start(home: Path, mine: dict[str, str]) -> Service:
    """Start this process's own server, which may not answer yet."""
    port = free_port()
    env = base_environment(PROJECT, os.environ) | mine
    env["PREFECT_API_URL"] = f"http://{HOST}:{port}/api"
    # On disk, the leases of a killed run are seen by the next run's server, which frees its slots.
    env["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"] = LEASES_ON_DISK
    python = [sys.executable, "-m"]
    argv = [*python, "tasks.databases", SERVER, str(home / "prefect.db"), *python]
    argv += ["prefect", "server", "start", "--no-ui", "--host", HOST, "--port", str(port)]
    name = "own-prefect-server"
    return start(name, argv, env=env, cwd=PROJECT.root, log=home / "server.log", port=port)


def _watch(server: Service, over: threading.Event) -> None:
    """End this process if its server ends first: every call would wait for an answer."""
    psutil.Process(server.pid).wait()
    if not over.is_set():
        say("the run's own Prefect server has ended; start the run again: what is finished is kept")
        os._exit(1)

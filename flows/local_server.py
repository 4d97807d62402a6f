"""The Prefect server of `python -m flows.mta`: there for one run, and gone with it.

A run that is killed cannot end its server, give back its slots or say that it is over; the next
one does that before it begins. A run whose server is killed could only wait for it: it ends.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil

from tasks.store.databases import PREFECT, make_whole

# Says in a server's environment which process it was started for.
OWNER = "MTA_LOCAL_OWNER"


@contextlib.contextmanager
def local_server(home: Path) -> Iterator[None]:
    """Run the body against a server of its own, its database in `home`.

    The project's server may be running, and two servers on one sqlite file get in each other's way.
    """
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_HOME,
        PREFECT_RESULTS_DEFAULT_SERIALIZER,
        PREFECT_SERVER_ANALYTICS_ENABLED,
        PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE,
        PREFECT_SERVER_DATABASE_CONNECTION_URL,
        PREFECT_SERVER_EPHEMERAL_ENABLED,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
        temporary_settings,
    )

    home.mkdir(parents=True, exist_ok=True)
    alone = end_orphans(home)
    database = home / "prefect.db"
    os.environ[OWNER] = str(os.getpid())
    settings: dict[Any, Any] = {
        PREFECT_HOME: home,
        PREFECT_SERVER_EPHEMERAL_ENABLED: True,
        # On disk: slots of a run that was killed are then freed by the server of another.
        PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE: (
            "prefect.server.concurrency.lease_storage.filesystem"
        ),
        # On a machine that is busy it takes longer than Prefect's own 20 seconds.
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 180,
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
        PREFECT_RESULTS_DEFAULT_SERIALIZER: "json",
    }
    with temporary_settings(updates=settings, restore_defaults={PREFECT_API_URL}):
        # Unless the user has set another.
        if PREFECT_SERVER_DATABASE_CONNECTION_URL.value() == f"sqlite+aiosqlite:///{database}":
            make_whole(PREFECT, database)
        server = SubprocessASGIServer()
        server.start()
        over = threading.Event()
        try:
            threading.Thread(target=_watch, args=(server.server_process, over), daemon=True).start()
            # Its address by name: worker processes would each start a server of their own.
            with temporary_settings(updates={PREFECT_API_URL: server.api_url}):
                if alone:
                    clear_up()
                yield
        finally:
            # It ends with the process, after what Prefect still has to send it: an exit without it
            # would take a minute of waiting.
            over.set()
            del os.environ[OWNER]


def server_name() -> str:
    """What tells this run's Prefect server from others: its address, or, where a run has one for
    itself, the home that all of these share."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME

    address = None if OWNER in os.environ else PREFECT_API_URL.value()
    return str(address or PREFECT_HOME.value())


def end_orphans(home: Path) -> bool:
    """End servers on `home` whose run was killed; whether no run is left that uses it."""
    alone = True
    for process in psutil.process_iter():
        try:
            env = process.environ()
            if OWNER not in env or env.get("PREFECT_HOME") != str(home):
                continue
            # A pid that was handed out again belongs to no server's parent.
            if process.ppid() == int(env[OWNER]):
                alone = False
                continue
            process.kill()
            process.wait(10)
        except (psutil.Error, OSError, ValueError):
            continue  # gone, or another user's
    return alone


def clear_up() -> None:
    """Of the runs that this server takes to be under way none is: end them, free their slots.

    A server that has just started knows no leases, so no lease's end would ever free these.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    from tasks.stage import GPU_LIMIT, gpu_slots

    gpu_slots()
    under_way = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    where = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=under_way)),
    )
    with get_client(sync_client=True) as client:
        limit = client.read_global_concurrency_limit_by_name(GPU_LIMIT)
        if limit.active_slots:
            client.update_global_concurrency_limit(
                GPU_LIMIT, GlobalConcurrencyLimitUpdate(active_slots=0)
            )
        while runs := client.read_flow_runs(flow_run_filter=where):
            for run in runs:
                client.set_flow_run_state(run.id, Crashed(message="It was killed."), force=True)


def _watch(server: Popen[Any], over: threading.Event) -> None:
    """End this process when its server ends before it: every call would wait for an answer."""
    server.wait()
    if not over.is_set():
        print(
            "mta: the run's own Prefect server has ended; start the run again, "
            "what was finished is kept",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

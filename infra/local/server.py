"""What the stack sets up on the Prefect server, and what it ends there.

By plain requests: Prefect's client takes a second to import, and reads the user's own settings.
"""

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from infra.command import say
from infra.local.processes import end, last_line, part
from infra.local.settings import (
    DEPLOYMENT,
    DEPLOYMENTS,
    GPU_LIMIT,
    WORK_POOL,
    WORKER,
    Layout,
    StackError,
)

# Never through a proxy: the servers are on this machine.
HTTP = httpx.Client(trust_env=False, timeout=30)
PAGE = 200  # the most rows the server returns at once
BUSY_SECONDS = 30.0  # how long a server may say that it is too busy
# Filters of the server's routes.
UNDER_WAY = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
OPEN = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING", "CRASHED"]}}}

Rows = list[dict[str, Any]]


def answers(url: str) -> bool:
    """Whether a GET of `url` is answered with 200."""
    try:
        return HTTP.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


@dataclass(frozen=True)
class PrefectApi:
    """The server's REST API; `url` ends in `/api`."""

    url: str

    def call(self, method: str, path: str, body: object = None) -> Any:
        """The reply's JSON; None where the server says 404 or sends nothing.

        A server that is too busy (503: sqlite is locked) is asked again. It may have made what it
        was asked for, and then says 409: that is None, too. Raises StackError where it refuses or
        does not answer.
        """
        limit = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                reply = HTTP.request(method, self.url + path, json=body)
            except httpx.HTTPError as error:
                raise StackError(f"Prefect at {self.url} does not answer: {error}") from None
            if reply.status_code != 503 or time.monotonic() > limit:
                break
            time.sleep(1)
        if reply.status_code in (404, 409) or not (reply.is_error or reply.content):
            return None
        if reply.is_error:
            detail = f"{reply.status_code} {reply.text[:300]}"
            raise StackError(f"Prefect refused {method} {path}: {detail}")
        return reply.json()

    def rows(self, kind: str, **filters: Any) -> Rows:
        """All flow runs or task runs that pass filters, page by page."""
        rows: Rows = []
        while True:
            body = {**filters, "limit": PAGE, "offset": len(rows)}
            page = self.call("POST", f"/{kind}/filter", body) or []
            rows += page
            if len(page) < PAGE:
                return rows

    def set_state(self, kind: str, run: str, state: str, name: str, message: str) -> None:
        body = {"state": {"type": state, "name": name, "message": message}, "force": True}
        self.call("POST", f"/{kind}/{run}/set_state", body)


def ensure_pool_and_limit(api: PrefectApi, slots: int) -> None:
    """Make the work pool if needed, and give the `gpu` limit so many slots (0: leave it)."""
    # The worker fills in the job template when it first reports; one that is there stays.
    api.call("POST", "/work_pools/", {"name": WORK_POOL, "type": "process"})
    limit = f"/v2/concurrency_limits/{GPU_LIMIT}"
    if slots and api.call("GET", limit):
        api.call("PATCH", limit, {"limit": slots})
    elif slots:
        api.call("POST", "/v2/concurrency_limits/", {"name": GPU_LIMIT, "limit": slots})


def deployed_from(root: Path) -> str:
    """The time of the last change to what is deployed: prefect.yaml and the flow's code."""
    sources = [root / "prefect.yaml", *root.glob("flows/**/*.py"), *root.glob("tasks/**/*.py")]
    return str(max(source.stat().st_mtime_ns for source in sources))


def ensure_deployment(
    layout: Layout, api: PrefectApi, env: Mapping[str, str], *, always: bool = False
) -> None:
    """Deploy, unless the server has the deployment of these very files."""
    note, route = layout.state / "deployed.txt", f"/deployments/name/{DEPLOYMENT}"
    source, there = deployed_from(layout.root), api.call("GET", route)
    known = note.read_text() if note.exists() else ""
    if not always and there is not None and known == f"{source} {there['id']}":
        return
    log = layout.logs / "deploy.log"
    argv = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    with log.open("wb") as out:
        done = subprocess.run(
            argv, cwd=layout.root, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    there = api.call("GET", route)
    if done.returncode or there is None:
        raise StackError(f"deploying {DEPLOYMENT} failed: {last_line(log)} (see {log})")
    note.write_text(f"{source} {there['id']}")
    say("deployed")


def crash(api: PrefectApi, runs: Rows, reason: str) -> None:
    """Set flow runs to CRASHED, and those of their task runs that are not over."""
    ids = {"any_": [run["id"] for run in runs]}
    tasks = api.rows("task_runs", flow_runs={"id": ids}, task_runs=OPEN) if runs else []
    for kind, rows in (("task_runs", tasks), ("flow_runs", runs)):
        for row in rows:
            api.set_state(kind, row["id"], "CRASHED", "Crashed", reason)


def free_slots(api: PrefectApi, home: Path) -> None:
    """Free the slots of our limits. No run may be under way. home: the server's."""
    # A lease that outlives its slot would free another run's slot later.
    for lease in (home / "concurrency_leases").glob("*.json"):
        lease.unlink(missing_ok=True)
    for limit in api.call("POST", "/v2/concurrency_limits/filter", {}):
        is_ours = limit["name"] == GPU_LIMIT or limit["name"].startswith("deployment:")
        if is_ours and limit["active_slots"]:
            api.call("PATCH", f"/v2/concurrency_limits/{limit['id']}", {"active_slots": 0})


def end_worker(layout: Layout, api: PrefectApi, reason: str) -> None:
    """End the only worker and its jobs, set their runs to CRASHED, and free their slots."""
    flows, names = zip(*(name.split("/") for name in DEPLOYMENTS), strict=True)
    ours = {"flows": {"name": {"any_": flows}}, "deployments": {"name": {"any_": names}}}
    left = api.rows("flow_runs", flow_runs=UNDER_WAY, **ours)
    end(part(layout, WORKER))
    # A job that is ended reports that, but not why, so its message is replaced. One that finished
    # just then keeps its state.
    ids = {"any_": [run["id"] for run in left]}
    still = api.rows("flow_runs", flow_runs={"id": ids, **OPEN}) if left else []
    crash(api, still, reason)
    for run in still:
        say(f"flow run {run['name']!r} had no worker any more: set to CRASHED")
    # Scheduled runs of several weeks may be late. They would run before the one that the user asks
    # for. Find them by time: a server that has just started has not set their state Late yet.
    past = {"next_scheduled_start_time": {"before_": datetime.now(UTC).isoformat()}}
    scheduled = {"state": {"type": {"any_": ["SCHEDULED"]}}, **past}
    late = api.rows("flow_runs", flow_runs=scheduled, **ours)
    missed = [run["id"] for run in late if run["auto_scheduled"]]
    for identity in missed:
        api.set_state("flow_runs", identity, "CANCELLED", "Skipped", "The local stack was down.")
    if missed:
        say(f"{len(missed)} scheduled run(s) were missed while the stack was down: skipped")
    # Other runs under way may hold leases, and a lease does not name its holder. Then orphaned ones
    # end by themselves, those of the `gpu` limit after a minute.
    if not api.rows("flow_runs", flow_runs=UNDER_WAY):
        free_slots(api, layout.prefect_home)

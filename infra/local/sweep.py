"""After a worker's death: end what it left running, and give back what that held.

Not run by itself; the stack calls `sweep` when no worker is alive and before one starts. There is
one worker, so whatever the server still believes to be running then has no one looking after it:

- the job's own process survives the worker's and would go on writing;
- its flow run stays RUNNING, since nobody is left to report its end;
- its slots of the `gpu` limit and of the deployment's limit stay taken until their leases end, and
  the next run would wait for that.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import psutil

from infra.local.api import PrefectApi
from infra.local.processes import end_all
from infra.local.settings import DEPLOYMENT, GPU_LIMIT, Layout

UNDER_WAY = ["RUNNING", "PENDING", "CANCELLING"]
OPEN = [*UNDER_WAY, "CRASHED"]
MARK = "PREFECT__FLOW_RUN_ID"


def job_processes(layout: Layout) -> dict[psutil.Process, str]:
    """The processes of this stack's flow runs, with their run's id; told by their environment."""
    found = {}
    for process in psutil.process_iter():
        try:
            env = process.environ()
        except (psutil.Error, OSError):
            continue  # gone, or another user's
        if MARK in env and env.get("MTA_ROOT") == str(layout.root):
            found[process] = env[MARK]
    return found


def end_jobs(layout: Layout) -> int:
    """End every job of this stack with its children; return how many runs these belonged to."""
    jobs = job_processes(layout)
    family = set(jobs)
    for process in jobs:
        try:
            family.update(process.children(recursive=True))
        except psutil.Error:
            continue
    end_all(family, grace=5.0)
    return len(set(jobs.values()))


def sweep(layout: Layout, api: PrefectApi, say: Callable[[str], None], *, reason: str) -> None:
    """Leave nothing of earlier runs behind, so that the next one can start at once."""
    deployment = api.call("GET", f"/deployments/name/{DEPLOYMENT}")
    limits = [api.call("GET", f"/v2/concurrency_limits/{GPU_LIMIT}")]
    holders: set[str] = set()
    left = [] if deployment is None else _under_way(api, deployment["id"])
    end_jobs(layout)
    if deployment is not None:
        # A job that is told to end reports that it was, not why: its words are replaced. One that
        # came to its end just then keeps its state.
        runs = [run for run in map(partial(_again, api), left) if run["state_type"] in OPEN]
        holders = _crash(api, runs, reason)
        for run in runs:
            say(f"flow run {run['name']!r} had no worker any more: set to CRASHED")
        skipped = _skip_missed(api, deployment["id"])
        if skipped:
            say(f"{skipped} scheduled run(s) were missed while the stack was down: skipped")
        limits.append(deployment.get("global_concurrency_limit"))
    # A lease rarely says whose it is (`concurrency()` does not send its holder). Where no other run
    # is under way, such as a flow called by hand against this server, it can only be an orphan's.
    alone = not _under_way(api)
    for limit in limits:
        if limit is not None:
            _release(layout, api, limit["id"], holders, alone, say)


def _under_way(api: PrefectApi, deployment_id: str | None = None) -> list[dict[str, Any]]:
    """The flow runs that the server takes to be running, all or those of one deployment."""
    where: dict[str, object] = {"flow_runs": {"state": {"type": {"any_": UNDER_WAY}}}}
    if deployment_id is not None:
        where["deployments"] = {"id": {"any_": [deployment_id]}}
    return api.everything("/flow_runs/filter", where)


def _again(api: PrefectApi, run: dict[str, Any]) -> dict[str, Any]:
    return api.call("GET", f"/flow_runs/{run['id']}") or run


def _crash(api: PrefectApi, runs: list[dict[str, Any]], reason: str) -> set[str]:
    """Set `runs`, their sub-flows and their task runs to CRASHED; return the ids of all."""
    state = {"type": "CRASHED", "name": "Crashed", "message": reason}
    seen: set[str] = set()
    while runs:
        ids = [run["id"] for run in runs]
        seen.update(ids)
        tasks = api.everything(
            "/task_runs/filter",
            {
                "flow_runs": {"id": {"any_": ids}},
                "task_runs": {"state": {"type": {"any_": OPEN}}},
            },
        )
        sub_flows = api.everything(
            "/flow_runs/filter",
            {
                "flow_runs": {
                    "parent_flow_run_id": {"any_": ids},
                    "state": {"type": {"any_": OPEN}},
                }
            },
        )
        for kind, rows in (("task_runs", tasks), ("flow_runs", runs)):
            for row in rows:
                body = {"state": state, "force": True}
                api.call("POST", f"/{kind}/{row['id']}/set_state", body)
                seen.add(row["id"])
        runs = [run for run in sub_flows if run["id"] not in seen]
    return seen


def _skip_missed(api: PrefectApi, deployment_id: str) -> int:
    """Runs of the schedule whose time passed while no worker was there are not made up for:
    several weeks of them would run before the run that the user now asks for."""
    # By their time, not by the name Late: a server that has just started has not given it yet.
    late = api.everything(
        "/flow_runs/filter",
        {
            "flow_runs": {
                "state": {"type": {"any_": ["SCHEDULED"]}},
                "next_scheduled_start_time": {"before_": datetime.now(UTC).isoformat()},
            },
            "deployments": {"id": {"any_": [deployment_id]}},
        },
    )
    missed = [run for run in late if run.get("auto_scheduled")]
    state = {"type": "CANCELLED", "name": "Skipped", "message": "The local stack was down."}
    for run in missed:
        api.call("POST", f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
    return len(missed)


def _release(
    layout: Layout,
    api: PrefectApi,
    limit_id: str,
    holders: set[str],
    alone: bool,
    say: Callable[[str], None],
) -> None:
    """Give back the slots of one limit that `holders` still lease; all of them if `alone`.

    Through their leases, not by setting the count to zero: a lease that outlives its slot would
    later take one away from a run that came after.
    """
    others = 0
    for file in layout.leases.glob("*-*.json"):
        try:
            lease = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # ended just now
        if limit_id not in lease.get("resource_ids", []):
            continue
        holder = ((lease.get("metadata") or {}).get("holder") or {}).get("id")
        if alone or holder in holders:
            body = {"lease_id": lease["id"]}
            api.call("POST", "/v2/concurrency_limits/decrement-with-lease", body)
        else:
            others += 1
    limit = api.call("GET", f"/v2/concurrency_limits/{limit_id}")
    # Slots without any lease: the lease files were lost, and nothing else would ever free them.
    if limit and limit["active_slots"] and alone and not others:
        api.call("PATCH", f"/v2/concurrency_limits/{limit_id}", {"active_slots": 0})
        say(f"limit {limit['name']!r}: {limit['active_slots']} lost slot(s) given back")

"""What the stack tells the Prefect server: the work pool, the `gpu` limit, the deployment.

Not run by itself. All of it lives in the server's database and is lost with it, so every start
makes sure of it again.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from infra.local.api import PrefectApi
from infra.local.processes import last_line
from infra.local.settings import DEPLOYMENT, GPU_LIMIT, WORK_POOL, Layout, StackError
from tasks.running.machine import cpu_jobs, gpu_driver


def ensure_work_pool(api: PrefectApi) -> None:
    if api.call("GET", f"/work_pools/{WORK_POOL}") is None:
        # The worker fills in the job template when it first reports.
        api.call("POST", "/work_pools/", {"name": WORK_POOL, "type": "process"})


def ensure_gpu_limit(api: PrefectApi, slots: int | None) -> None:
    """One slot, or without a GPU one per core (MOST_CPU_JOBS at most), unless told otherwise.

    A limit that is there keeps its size unless told otherwise. It must exist: Prefect lets a task
    through a limit that does not.
    """
    limit = api.call("GET", f"/v2/concurrency_limits/{GPU_LIMIT}")
    if limit is None:
        usual = 1 if gpu_driver() else cpu_jobs()
        body = {"name": GPU_LIMIT, "limit": slots or usual}
        api.call("POST", "/v2/concurrency_limits/", body)
    elif slots is not None and limit["limit"] != slots:
        api.call("PATCH", f"/v2/concurrency_limits/{GPU_LIMIT}", {"limit": slots})


def deployed_from(layout: Layout) -> str:
    """A digest of what the deployment is made of: prefect.yaml and the code its flow comes from."""
    digest = hashlib.sha256(sys.prefix.encode())
    sources = [layout.root / "prefect.yaml"]
    for package in ("flows", "tasks"):
        sources += sorted((layout.root / package).rglob("*.py"))
    for source in sources:
        digest.update(str(source.relative_to(layout.root)).encode())
        digest.update(source.read_bytes() if source.exists() else b"")
    return digest.hexdigest()


def ensure_deployment(
    layout: Layout, api: PrefectApi, env: Mapping[str, str], *, always: bool = False
) -> bool:
    """Deploy, unless the server has what these very files gave; return whether it deployed."""
    note = layout.state / "deployed.json"
    source = deployed_from(layout)
    there = api.call("GET", f"/deployments/name/{DEPLOYMENT}")
    if not always and there is not None and _noted(note) == [source, there["id"]]:
        return False
    log = layout.logs / "deploy.log"
    with log.open("wb") as out:
        code = subprocess.call(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            cwd=layout.root,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    there = api.call("GET", f"/deployments/name/{DEPLOYMENT}")
    if code or there is None:
        raise StackError(f"deploying {DEPLOYMENT} failed: {last_line(log)} (see {log})")
    note.write_text(json.dumps([source, there["id"]]), encoding="utf-8")
    return True


def _noted(note: Path) -> object:
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None

"""Commands of the image (infra/Dockerfile).

    python -m infra.containers worker      work pool, `gpu` limit and deployment, then the worker
    python -m infra.containers buckets     the buckets named in MTA_BUCKETS (mta,mlflow)

Addresses come from the environment: PREFECT_API_URL for the worker, AWS_ENDPOINT_URL and keys for
the buckets. GPU_SLOTS (1) is how many jobs train at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from infra.buckets import make_buckets
from infra.command import one_word, say
from infra.local.api import PrefectApi, answers
from infra.local.register import ensure_deployment, ensure_gpu_limit, ensure_work_pool
from infra.local.settings import WORK_POOL, Layout, StackError, integer


def worker(environ: Mapping[str, str]) -> list[str]:
    """Make sure of what the server must know; the command line of the worker.

    Raises StackError where PREFECT_API_URL is not set or nothing answers there.
    """
    address = environ.get("PREFECT_API_URL", "").rstrip("/")
    if not address:
        raise StackError("PREFECT_API_URL is not set: give the address of the Prefect server")
    if not answers(f"{address}/health"):
        raise StackError(f"no Prefect server answers at {address}")
    slots = integer(environ, "GPU_SLOTS", 0, least=0, most=1024) or None
    layout = Layout(Path(environ.get("MTA_ROOT", "") or Path.cwd()).absolute())
    layout.make()
    api = PrefectApi(address)
    ensure_work_pool(api)
    ensure_gpu_limit(api, slots)
    ensure_deployment(layout, api, {**environ, "MTA_ROOT": str(layout.root)})
    python = [sys.executable, "-m", "prefect"]
    return [*python, "worker", "start", "--pool", WORK_POOL, "--type", "process"]


def run_worker() -> None:
    command = worker(os.environ)
    os.execv(command[0], command)  # signals are the worker's own


def buckets() -> None:
    names = os.environ.get("MTA_BUCKETS", "mta,mlflow").split(",")
    for name in make_buckets(filter(None, names), os.environ):
        say(f"made bucket {name}")


COMMANDS = {"worker": run_worker, "buckets": buckets}


def main(argv: list[str]) -> int:
    return one_word("infra.containers", __doc__, COMMANDS, argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

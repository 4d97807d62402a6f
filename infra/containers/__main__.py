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
from infra.local.api import PrefectApi, answers
from infra.local.register import ensure_deployment, ensure_gpu_limit, ensure_work_pool
from infra.local.settings import WORK_POOL, Layout, StackError, integer

COMMANDS = ("worker", "buckets")


def say(text: str) -> None:
    print(f"mta: {text}", file=sys.stderr, flush=True)


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


def main(argv: list[str]) -> int:
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(argv) != 1 or argv[0] not in COMMANDS:
        say(f"usage: python -m infra.containers {'|'.join(COMMANDS)}")
        return 2
    try:
        if argv == ["buckets"]:
            names = os.environ.get("MTA_BUCKETS", "mta,mlflow").split(",")
            for name in make_buckets(filter(None, names), os.environ):
                say(f"made bucket {name}")
            return 0
        command = worker(os.environ)
    except StackError as error:
        say(str(error))
        return 1
    os.execv(command[0], command)  # signals are the worker's own


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

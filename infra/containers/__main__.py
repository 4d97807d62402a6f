"""Commands of the image (infra/Dockerfile).

Addresses come from the environment: PREFECT_API_URL for the worker, AWS_ENDPOINT_URL and keys for
the buckets.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

from typer import Option, Typer

from infra.command import run, say
from infra.local.server import PrefectApi, answers, ensure_deployment, ensure_pool_and_limit
from infra.local.settings import WORK_POOL, Layout, StackError

app = Typer(
    name="python -m infra.containers", add_completion=False, rich_markup_mode=None, help=__doc__
)


@app.command()
def worker(
    gpu_slots: Annotated[
        int, Option(envvar="GPU_SLOTS", min=0, max=1024, help="How many jobs train at once.")
    ] = 0,
) -> None:
    """Make sure of work pool, `gpu` limit and deployment, then become the worker."""
    address = os.environ.get("PREFECT_API_URL", "").rstrip("/")
    if not address:
        raise StackError("PREFECT_API_URL is not set: give the address of the Prefect server")
    if not answers(f"{address}/health"):
        raise StackError(f"no Prefect server answers at {address}")
    layout = Layout(Path(os.environ.get("MTA_ROOT", "")).absolute())
    layout.make()
    api = PrefectApi(address)
    ensure_pool_and_limit(api, gpu_slots)
    ensure_deployment(layout, api, {**os.environ, "MTA_ROOT": str(layout.root)})
    argv = [sys.executable, "-m", "prefect", "worker", "start", "--pool", WORK_POOL]
    os.execv(argv[0], [*argv, "--type", "process"])  # signals are the worker's own


@app.command()
def buckets(
    names: Annotated[str, Option(envvar="MTA_BUCKETS", help="Names with commas.")] = "mta,mlflow",
) -> None:
    """Make the buckets that are not there yet on an S3-compatible server."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client = boto3.client("s3")
        known = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
        for name in sorted({*filter(None, names.split(","))} - known):
            client.create_bucket(Bucket=name)
            say(f"made bucket {name}")
    except (BotoCoreError, ClientError) as error:
        address = os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        raise StackError(f"S3 at {address}: {error}") from error


if __name__ == "__main__":
    sys.exit(run(app))

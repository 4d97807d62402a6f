"""An S3-compatible server for tests: moto's, which keeps everything in memory.

Not run by itself; `python -m infra.native` is the program. What it holds is gone when it ends: for
data that matters give a real one by AWS_ENDPOINT_URL (infra/compose.yaml has one).
"""

from __future__ import annotations

import importlib.util
import sys

from infra.local.settings import HOST, StackError

NAME = "s3"
BUCKETS = ("mta", "mlflow")
# Any will do: moto checks none.
KEYS = {
    "AWS_ACCESS_KEY_ID": "mta",
    "AWS_SECRET_ACCESS_KEY": "mta",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def command(port: int) -> list[str]:
    if importlib.util.find_spec("moto") is None:
        raise StackError("the S3 server is not installed: pip install -e '.[test]'")
    return [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]


def environment(port: int) -> dict[str, str]:
    """Its address, as boto3 and MLflow want it, and the keys."""
    address = f"http://{HOST}:{port}"
    return {"AWS_ENDPOINT_URL": address, "MLFLOW_S3_ENDPOINT_URL": address, **KEYS}


def health_url(port: int) -> str:
    return f"http://{HOST}:{port}/moto-api/data.json"

"""`python -m flows.mta`: the flow in this process, without a Prefect or MLflow server."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tasks.command import in_one_line
from tasks.config import resolve
from tasks.errors import InputError


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    """Run the flow with `-p name=value`; the exit code is 0 only when nothing is missing."""
    parser = argparse.ArgumentParser(prog="python -m flows.mta", description=__doc__)
    parser.add_argument(
        "-p", "--param", action="append", default=[], metavar="NAME=VALUE",
        help="a field of the configuration, as in `prefect deployment run -p`",
    )  # fmt: skip
    given = parameters(parser.parse_args(arguments).param)
    resolve(given)
    from flows.local_server import local_server
    from flows.mta import mta

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with local_server(Path(".mta/local").absolute()):
        state = mta(**given, return_state=True)
    if not state.is_completed():
        print(f"mta: {state.name}: {state.message}", file=sys.stderr)
        return 1
    return 0


def parameters(given: list[str]) -> dict[str, Any]:
    """`name=value` pairs; a value that is JSON is read as JSON, any other is text."""
    values: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals:
            raise InputError(f"-p {item}: write it as name=value")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values

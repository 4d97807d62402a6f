"""`python -m flows.mta`: the flow in this process, without a Prefect or MLflow server."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tasks.config import resolve
from tasks.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Run the flow with `-p name=value`; the exit code is 0 only when nothing is missing."""
    parser = argparse.ArgumentParser(prog="python -m flows.mta", description=__doc__)
    parser.add_argument(
        "-p", "--param", action="append", default=[], metavar="NAME=VALUE",
        help="a field of the configuration, as in `prefect deployment run -p`",
    )  # fmt: skip
    try:
        given = parameters(parser.parse_args(arguments).param)
        resolve(given)
    except InputError as error:
        print(f"mta: {error}", file=sys.stderr)
        return 2
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_HOME,
        PREFECT_RESULTS_DEFAULT_SERIALIZER,
        PREFECT_SERVER_ANALYTICS_ENABLED,
        PREFECT_SERVER_EPHEMERAL_ENABLED,
        temporary_settings,
    )

    from flows.mta import mta

    # A server of its own for the length of the run, with a database of its own: the project's
    # server may be running, and two servers on one sqlite file get in each other's way.
    home = Path(".mta/local").absolute()
    home.mkdir(parents=True, exist_ok=True)
    alone = {
        PREFECT_HOME: home,
        PREFECT_SERVER_EPHEMERAL_ENABLED: True,
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
        PREFECT_RESULTS_DEFAULT_SERIALIZER: "json",
    }
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    with temporary_settings(updates=alone, restore_defaults={PREFECT_API_URL}):
        server = SubprocessASGIServer()
        server.start()
        # Its address by name: worker processes would each start a server of their own.
        with temporary_settings(updates={PREFECT_API_URL: server.api_url}):
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

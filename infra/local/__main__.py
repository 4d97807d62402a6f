"""The program behind the Makefile: `python -m infra.local COMMAND`.

More variables: MLFLOW_TRACKING_URI (another MLflow; then none is started here),
MTA_PREFECT_DATABASE, MTA_MLFLOW_DATABASE and MTA_MLFLOW_ARTIFACTS (instead of files below .mta;
read when a server starts).
"""

import sys
from typing import Annotated

from typer import Context, Option, Typer

from infra import command
from infra.local import stack
from infra.local.benchmark import benchmark

app = Typer(name="python -m infra.local", add_completion=False, rich_markup_mode=None, help=__doc__)
for plain in (stack.status, stack.down, stack.clean):
    app.command()(plain)


@app.callback()
def options(
    context: Context,
    prefect_port: Annotated[int, Option(envvar="PREFECT_PORT", min=1, max=65535)] = 4200,
    mlflow_port: Annotated[int, Option(envvar="MLFLOW_PORT", min=1, max=65535)] = 5000,
    gpu_slots: Annotated[int, Option(envvar="GPU_SLOTS", min=0, max=1024)] = 0,
) -> None:
    context.obj = prefect_port, mlflow_port, gpu_slots


@app.command()
def up(context: Context, deploy: bool = False) -> None:
    """Start what does not run yet; `--deploy`: and deploy in any case."""
    stack.up(*context.obj, deploy=deploy)


@app.command(
    "benchmark", context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
def watched(context: Context) -> int:
    """As `up`, then one run, watched to its end; arguments go to `prefect deployment run`."""
    return benchmark(stack.up(*context.obj), context.args)


@app.command()
def worker(context: Context, api_url: Annotated[str, Option(envvar="PREFECT_API_URL")]) -> None:
    """In a container (infra/Dockerfile): become the worker of a Prefect server elsewhere."""
    stack.become_worker(api_url.rstrip("/"), context.obj[2])


if __name__ == "__main__":
    sys.exit(command.run(app))

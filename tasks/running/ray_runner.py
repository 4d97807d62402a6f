"""The runner on Ray (`compute.runner=ray`): each job that runs the model is a task of the cluster.

Imported only where it is asked for: ray and prefect-ray are the extra `ray`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from prefect.settings import PREFECT_API_URL
from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options

from tasks.config.options import ComputeOptions
from tasks.config.run import RunConfig
from tasks.errors import InputError, masked, short
from tasks.log import log
from tasks.results.store import store_place
from tasks.running.slots import ON_RAY

# How often Ray starts a job again whose machine or process was lost.
MAX_RETRIES = 3
# What of this run's environment workers get, where it is set. No passwords: Ray shows these.
# What storage asks for must be in the environment of the nodes.
PASSED_ON = ("DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE",
             "PREFECT_SERVER_ANALYTICS_ENABLED", "TOKENIZERS_PARALLELISM")  # fmt: skip


@contextmanager
def ray_runner(config: RunConfig) -> Iterator[RayTaskRunner[Any]]:
    """Prefect's runner on the cluster, or on a Ray that is started here; each job asks for
    `compute.cpus_per_job` and `gpus_per_job`.

    Raises InputError where no cluster answers.
    """
    compute = config.compute
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray reports to its makers otherwise
    init: dict[str, Any] = {"runtime_env": runtime_env()}
    if compute.ray_address is None:
        init |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    runner: RayTaskRunner[Any] = RayTaskRunner(compute.ray_address or "local", init_kwargs=init)
    try:
        entered = runner.__enter__()
    except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        raise InputError(
            f"compute.ray_address {compute.ray_address}: no Ray cluster answers there "
            f"({short(error)}); give the address of its head, as in `ray status`"
        ) from error
    try:
        gpus = _gpus_per_job(compute)
        with remote_options(
            num_cpus=compute.cpus_per_job, num_gpus=gpus, max_retries=MAX_RETRIES,
            scheduling_strategy="SPREAD",
        ):  # fmt: skip
            yield entered
    finally:
        runner.__exit__(None, None, None)


def _gpus_per_job(compute: ComputeOptions) -> float:
    cluster: Any = ray  # it has no types
    has = cluster.cluster_resources().get("GPU", 0.0)
    if compute.device == "cuda" and not has:
        log("Ray: no node has a GPU now; jobs wait until one has", warning=True)
    wanted = compute.device == "cuda" or (compute.device == "auto" and has)
    return compute.gpus_per_job if wanted else 0.0


def runtime_env() -> dict[str, Any]:
    """What a worker needs that its machine does not have: this code, and where things are."""
    code = Path(__file__).resolve().parents[2]
    variables = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    api = str(PREFECT_API_URL.value())
    variables |= {ON_RAY: "1", "MTA_STORE": store_place(), "PREFECT_API_URL": api}
    for name, text in variables.items():
        if masked(text) != text:
            raise InputError(f"{name}: it holds a password, which Ray shows to all its nodes")
    modules = [str(code / "flows"), str(code / "tasks")]
    return {"py_modules": modules, "env_vars": variables, "excludes": ["__pycache__"]}

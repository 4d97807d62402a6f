"""The runner on Ray (`compute.runner=ray`): each job that runs the model is a task of the cluster.

Imported only where it is asked for: ray and prefect-ray are the extra `ray`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
from prefect import Task
from prefect.settings import PREFECT_API_URL
from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options

from tasks.config import RunConfig
from tasks.errors import InputError, masked
from tasks.running.pool import Shared, SharedThreads
from tasks.stage import ON_RAY, log, store_place, unquoted, uses_model

# How often Ray starts a job again whose machine or process was lost.
MAX_RETRIES = 3
# What workers are told of this run's environment, where it is set. No passwords: Ray shows these.
# What storage asks for must be in the environment of the nodes.
TOLD = (
    "DO_NOT_TRACK",
    "HF_HUB_DISABLE_TELEMETRY",
    "HF_HUB_OFFLINE",
    "MLFLOW_DISABLE_TELEMETRY",
    "MLFLOW_TRACKING_URI",
    "PREFECT_SERVER_ANALYTICS_ENABLED",
    "TOKENIZERS_PARALLELISM",
)


class SharedRay(Shared, RayTaskRunner[Any]):
    """Jobs that run the model on the cluster; Ray's own resources are the limit, no `gpu` slots.

    The other stages are short, and some read the data given: they stay here, in threads.
    """

    def __init__(self, config: RunConfig) -> None:
        compute = config.compute
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray reports to its makers otherwise
        init: dict[str, Any] = {"runtime_env": runtime_env()}
        if compute.ray_address is None:
            init |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        super().__init__(address=compute.ray_address or "local", init_kwargs=init)
        self._config = config
        self._here = SharedThreads(max_workers=os.cpu_count() or 1)
        self._gpus = 0.0

    def submit(
        self, task: Task[..., Any], parameters: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        self.refuse()
        if not uses_model(task):
            return self._here.submit(task, parameters, *args, **kwargs)
        with remote_options(
            num_cpus=self._config.compute.cpus_per_job,
            num_gpus=self._gpus,
            max_retries=MAX_RETRIES,
            scheduling_strategy="SPREAD",
        ):
            # Not quoted: on its way prefect-ray would quote each twice.
            return super().submit(task, unquoted(parameters), *args, **kwargs)

    def __enter__(self) -> SharedRay:
        with self._guard:
            try:
                super().__enter__()
            except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
                why = " ".join(str(error).split())[:200]
                raise InputError(
                    f"compute.ray_address {self.address}: no Ray cluster answers there ({why}); "
                    "give the address of its head, as in `ray status`"
                ) from error
            self._here.__enter__()
            if self._inside == 1:
                self._gpus = self._gpus_per_job()
        return self

    def __exit__(self, *error: Any) -> None:
        self._here.__exit__(*error)
        super().__exit__(*error)

    def _gpus_per_job(self) -> float:
        device, has = self._config.compute.device, ray.cluster_resources().get("GPU", 0.0)
        if device == "cuda" and not has:
            log("Ray: no node has a GPU now; jobs wait until one has", warning=True)
        return self._config.compute.gpus_per_job if device == "cuda" or (
            device == "auto" and has
        ) else 0.0  # fmt: skip


def runtime_env() -> dict[str, Any]:
    """What a worker needs that its machine does not have: this code, and where things are."""
    code = Path(__file__).resolve().parents[2]
    told = {name: os.environ[name] for name in TOLD if os.environ.get(name)}
    told |= {
        ON_RAY: "1",
        "MTA_STORE": store_place(),
        "PREFECT_API_URL": str(PREFECT_API_URL.value()),
    }
    for name, text in told.items():
        if name != "MLFLOW_TRACKING_URI" and masked(text) != text:
            raise InputError(f"{name}: it holds a password, which Ray shows to all its nodes")
    return {
        "py_modules": [str(code / "flows"), str(code / "tasks")],
        "env_vars": {name: text for name, text in told.items() if masked(text) == text},
        "excludes": ["__pycache__"],
    }

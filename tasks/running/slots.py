"""What this machine has for jobs: a GPU, cores, and slots of the `gpu` limit of jobs at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.context import TaskRunContext
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from tasks.config.options import ComputeOptions

# What the drivers of NVIDIA, of NVIDIA and AMD below Windows, and of AMD put there.
GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
# More processes than this would wait for the server and the disk rather than compute.
MOST_CPU_JOBS = 4
GPU_LIMIT = "gpu"
# Set in the environment of Ray's workers (tasks/running/ray_runner.py).
ON_RAY = "MTA_ON_RAY"
# The shortest lease Prefect grants: a slot whose holder was killed is free again after it.
SLOT_LEASE_SECONDS = 60


def gpu_driver() -> bool:
    """Whether a GPU's driver is loaded; torch may still find nothing that it can use."""
    return any(Path(name).exists() for name in GPU_FILES)


def device_of(compute: ComputeOptions) -> str:
    """`cpu` or `cuda`; without torch where there is no driver."""
    if compute.device != "auto":
        return compute.device
    if not gpu_driver():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def cpu_jobs() -> int:
    """How many jobs of one thread each run side by side where there is no GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, MOST_CPU_JOBS)


def gpu_slots(otherwise: int = 1) -> int:
    """How many slots the `gpu` limit has; created with `otherwise` where the server has none."""
    with get_client(sync_client=True) as client:
        with suppress(ObjectNotFound):
            return client.read_global_concurrency_limit_by_name(GPU_LIMIT).limit
        with suppress(ObjectAlreadyExists):
            client.create_global_concurrency_limit(
                GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=otherwise)
            )
        return client.read_global_concurrency_limit_by_name(GPU_LIMIT).limit


@contextmanager
def gpu_slot() -> Iterator[None]:
    """Hold one slot of the `gpu` limit. An absent limit is an error, never silently no limit.

    None is held outside a run, nor on Ray, which gives a job the GPUs it asks for.
    """
    if os.environ.get(ON_RAY) or TaskRunContext.get() is None:
        yield
        return
    # Losing the server for a moment must not throw away an hour of training.
    with concurrency(
        GPU_LIMIT, occupy=1, lease_duration=SLOT_LEASE_SECONDS, strict=True,
        raise_on_lease_renewal_failure=False,
    ):  # fmt: skip
        yield

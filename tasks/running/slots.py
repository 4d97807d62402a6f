"""The `gpu` limit: how many jobs of this machine run a model at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.context import TaskRunContext
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

GPU_LIMIT = "gpu"
# Set in the environment of Ray's workers (tasks/running/ray_runner.py).
ON_RAY = "MTA_ON_RAY"
# The shortest lease Prefect grants: a slot whose holder was killed is free again after it.
SLOT_LEASE_SECONDS = 60


def gpu_slots(otherwise: int = 1) -> int:
    """How many slots the `gpu` limit has; created with `otherwise` where the server has none."""
    with get_client(sync_client=True) as client:
        try:
            return client.read_global_concurrency_limit_by_name(GPU_LIMIT).limit
        except ObjectNotFound:
            with contextlib.suppress(ObjectAlreadyExists):
                client.create_global_concurrency_limit(
                    GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=otherwise)
                )
            return client.read_global_concurrency_limit_by_name(GPU_LIMIT).limit


@contextmanager
def gpu_slot() -> Iterator[None]:
    """Hold one slot of the `gpu` limit. An absent limit is an error, never silently no limit.

    On Ray none is held: Ray gives a job the GPUs it asks for. Nor outside a run.
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

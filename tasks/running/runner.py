"""Where the jobs of a run are run: threads, processes, or a Ray cluster (`compute.runner`).

One runner for the flow and all its sub-flows. No key and no number depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.context import FlowRunContext

from tasks.config import RunConfig
from tasks.errors import InputError
from tasks.running.machine import cpu_jobs, gpu_driver
from tasks.running.pool import Shared, SharedProcesses, SharedThreads
from tasks.stage import gpu_slots


def runner_of(config: RunConfig) -> Shared:
    """The runner, not yet entered. Raises InputError when it is Ray, which is not installed."""
    if config.compute.runner == "ray":
        try:
            from tasks.running.ray_runner import SharedRay
        except ImportError as error:
            raise InputError(
                f"compute.runner ray: {error.name} is not installed; make EXTRAS=ray, or pip "
                "install 'mta[ray]'"
            ) from error
        return SharedRay(config)
    if _kind(config) == "processes":
        return SharedProcesses(max_workers=workers(config))
    return SharedThreads(max_workers=workers(config))


@contextmanager
def shared(runner: Shared) -> Iterator[None]:
    """Inside, all that this flow runs goes to `runner`, also what its sub-flows run."""
    context = FlowRunContext.get()
    if context is None:
        raise RuntimeError("there is no flow run to share a runner with")
    # detached: sub-flows are started from several threads, and Prefect's count of them per flow
    # run, which names them, is not made for that; then each is named by a fresh uuid.
    with runner, context.model_copy(update={"task_runner": runner, "detached": True}):
        try:
            yield
        except BaseException:
            runner.kill()
            raise


def workers(config: RunConfig) -> int:
    """How many jobs run at once on this machine."""
    tiny, gpu = config.base.model == "tiny", uses_gpu(config)
    # One per slot: a run that waits for a slot asks the server again only every few seconds.
    slots = gpu_slots(1 if gpu else cpu_jobs())
    if config.compute.max_workers is not None:
        return config.compute.max_workers
    return slots if tiny or gpu else 1


def side_by_side(config: RunConfig) -> int:
    """How many LaMP tasks run at once."""
    if config.compute.runner == "ray":
        return config.compute.side_by_side or len(config.all_seeds) * len(config.lamp_tasks)
    return config.compute.side_by_side or workers(config)


def everywhere(config: RunConfig) -> RunConfig:
    """On Ray, with folders of models by their whole path: jobs run in other working folders."""
    if config.compute.runner != "ray":
        return config
    base = config.base.model_copy(update={"model": _whole(config.base.model)})
    anchors = config.anchors.model_copy(update={"text_model": _whole(config.anchors.text_model)})
    return config.model_copy(update={"base": base, "anchors": anchors})


def _whole(model: str) -> str:
    folder = Path(model).expanduser()
    return str(folder.absolute()) if folder.is_dir() else model


def uses_gpu(config: RunConfig) -> bool:
    """Whether jobs on this machine run on a GPU."""
    if config.compute.device != "auto":
        return config.compute.device == "cuda"
    if not gpu_driver():
        return False
    import torch

    return torch.cuda.is_available()


def _kind(config: RunConfig) -> str:
    if config.compute.workers is not None:
        return config.compute.workers
    return "processes" if config.base.model == "tiny" and not uses_gpu(config) else "threads"

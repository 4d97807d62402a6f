"""Where the jobs of a run that run a model go: threads, processes, or a Ray cluster.

Prefect's own task runners, as they come (`compute.runner`, `compute.workers`). No key and no number
depends on it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from prefect.settings import PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from tasks.config.run import RunConfig
from tasks.errors import InputError
from tasks.results.stage import RUNNER
from tasks.running.slots import cpu_jobs, device_of, gpu_slots


@contextmanager
def running(config: RunConfig) -> Iterator[None]:
    """Send stages that run a model to the configured runner, inside the block.

    Raises InputError where it is Ray, which is not installed or does not answer.
    """
    # A worker process whose first request gets no answer would exit, and its job would never end.
    settings = {PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED: False}
    with temporary_settings(settings), _runner(config) as runner:
        token = RUNNER.set(runner)
        try:
            yield
        finally:
            RUNNER.reset(token)


def _runner(config: RunConfig) -> AbstractContextManager[TaskRunner[Any]]:
    if config.compute.runner == "ray":
        try:
            from tasks.running.ray_runner import ray_runner
        except ImportError as error:
            raise InputError(
                f"compute.runner ray: {error.name} is not installed; make EXTRAS=ray, or pip "
                "install 'mta[ray]'"
            ) from error
        return ray_runner(config)
    small = config.base.model == "tiny" and device_of(config.compute) == "cpu"
    if (config.compute.workers or ("processes" if small else "threads")) == "processes":
        return ProcessPoolTaskRunner(max_workers=workers(config))
    return ThreadPoolTaskRunner(max_workers=workers(config))


def workers(config: RunConfig) -> int:
    """How many jobs run at once on this machine."""
    tiny, gpu = config.base.model == "tiny", device_of(config.compute) == "cuda"
    # One per slot: who waits for a slot asks the server only every few seconds.
    slots = gpu_slots(1 if gpu else cpu_jobs())
    return config.compute.max_workers or (slots if tiny or gpu else 1)


def side_by_side(config: RunConfig) -> int:
    """How many LaMP tasks run at once."""
    if config.compute.runner == "ray":
        return config.compute.side_by_side or len(config.all_seeds) * len(config.lamp_tasks)
    return config.compute.side_by_side or workers(config)


def everywhere(config: RunConfig) -> RunConfig:
    """For Ray the whole paths of models' folders and files: jobs run in other folders."""
    if config.compute.runner != "ray":
        return config
    base = config.base.model_copy(update={"model": _whole(config.base.model)})
    anchors = config.anchors.model_copy(update={"text_model": _whole(config.anchors.text_model)})
    return config.model_copy(update={"base": base, "anchors": anchors})


def _whole(model: str) -> str:
    place = Path(model).expanduser()
    return str(place.absolute()) if place.is_dir() or place.suffix == ".gguf" else model

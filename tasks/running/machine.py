"""What this machine has for jobs: whether there is a GPU, told without torch; how many cores."""

from __future__ import annotations

import os
from pathlib import Path

from tasks.config.options import ComputeOptions

# What the drivers of NVIDIA, of NVIDIA and AMD below Windows, and of AMD put there.
GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
# More processes than this would wait for the server and the disk rather than compute.
MOST_CPU_JOBS = 4


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
